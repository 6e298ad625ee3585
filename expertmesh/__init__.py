"""The Python API of expertmesh. ``LLM`` runs a model in this process; ``Client`` and
``AsyncClient`` call a running cluster. Names follow vLLM where vLLM has an equivalent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from expertmesh.client import AsyncClient as AsyncClient
    from expertmesh.client import Client as Client
    from expertmesh.errors import APIConnectionError as APIConnectionError
    from expertmesh.errors import APIError as APIError
    from expertmesh.errors import APITimeoutError as APITimeoutError
    from expertmesh.errors import AuthenticationError as AuthenticationError
    from expertmesh.errors import BadRequestError as BadRequestError
    from expertmesh.errors import ConflictError as ConflictError
    from expertmesh.errors import InternalServerError as InternalServerError
    from expertmesh.errors import NotFoundError as NotFoundError
    from expertmesh.errors import PermissionDeniedError as PermissionDeniedError
    from expertmesh.errors import RateLimitError as RateLimitError
    from expertmesh.llm import LLM as LLM
    from expertmesh.types import CompletionOutput as CompletionOutput
    from expertmesh.types import EmbeddingOutput as EmbeddingOutput
    from expertmesh.types import EmbeddingRequestOutput as EmbeddingRequestOutput
    from expertmesh.types import Logprob as Logprob
    from expertmesh.types import RequestOutput as RequestOutput
    from expertmesh.types import SamplingParams as SamplingParams


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: ``LLM`` imports torch, clients do not."""
    from importlib import import_module

    for module in ("types", "errors", "client", "llm"):
        if module != "llm" or name == "LLM":
            found = import_module(f"expertmesh.{module}")
            if name in vars(found) and not name.startswith("_"):
                return vars(found)[name]
    raise AttributeError(f"module 'expertmesh' has no attribute {name!r}")
