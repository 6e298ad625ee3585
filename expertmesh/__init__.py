"""The Python API of expertmesh. ``LLM`` runs a model in this process; ``Client`` and
``AsyncClient`` call a running cluster. Names follow vLLM where vLLM has an equivalent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from expertmesh.client import AsyncClient, Client
    from expertmesh.errors import (
        APIConnectionError,
        APIError,
        APITimeoutError,
        AuthenticationError,
        BadRequestError,
        ConflictError,
        InternalServerError,
        NotFoundError,
        PermissionDeniedError,
        RateLimitError,
    )
    from expertmesh.llm import LLM
    from expertmesh.types import (
        CompletionOutput,
        EmbeddingOutput,
        EmbeddingRequestOutput,
        Logprob,
        PoolingOutput,
        PoolingRequestOutput,
        RequestOutput,
        SamplingParams,
    )

__all__ = [
    "APIConnectionError",
    "APIError",
    "APITimeoutError",
    "AsyncClient",
    "AuthenticationError",
    "BadRequestError",
    "Client",
    "CompletionOutput",
    "ConflictError",
    "EmbeddingOutput",
    "EmbeddingRequestOutput",
    "InternalServerError",
    "LLM",
    "Logprob",
    "NotFoundError",
    "PermissionDeniedError",
    "PoolingOutput",
    "PoolingRequestOutput",
    "RateLimitError",
    "RequestOutput",
    "SamplingParams",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: ``LLM`` imports torch, clients do not."""
    from importlib import import_module

    if name in __all__:
        for module in ("types", "errors", "client", "llm"):
            names = vars(import_module(f"expertmesh.{module}"))
            if name in names:
                return names[name]
    raise AttributeError(f"module 'expertmesh' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
