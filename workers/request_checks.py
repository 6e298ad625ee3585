"""What an engine refuses before anything is allocated. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.errors import ContextLengthError, RequestError
from workers.request import Request


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestLimits:
    """Sizes of one engine."""

    vocab_size: int
    """Token ids are below it."""
    max_model_len: int
    """Tokens of prompt and output together."""
    block_size: int
    """Tokens of a KV block."""
    num_blocks: int
    """KV blocks of the worker."""


def check_request(request: Request, limits: RequestLimits) -> None:
    """Raise ``RequestError`` naming field, value and rule for what can never run."""
    params, length = request.params, len(request.prompt)
    _require(length > 0, "prompt must not be empty", "prompt")
    _require(request.n >= 1, f"n ({request.n}) must be at least 1", "n")
    _require(
        len(request.output_so_far) <= request.n,
        f"output_so_far has {len(request.output_so_far)} choices, n is {request.n}",
        "output_so_far",
    )
    _require(
        params.max_tokens >= 0,
        f"max_tokens ({params.max_tokens}) must not be negative",
        "max_tokens",
    )
    given = {
        "prompt": request.prompt,
        "output_so_far": [t for tokens in request.output_so_far for t in tokens],
        "logit_bias": [t for t, _ in params.logit_bias],
        "stop_token_ids": params.stop_token_ids,
    }
    for name, tokens in given.items():
        bad = next((t for t in tokens if not 0 <= t < limits.vocab_size), None)
        _require(
            bad is None,
            f"{name} has token id {bad}, ids must be 0 to {limits.vocab_size - 1}",
            name,
        )
    _check_length(length, params.max_tokens, limits)


def _check_length(length: int, max_tokens: int, limits: RequestLimits) -> None:
    if length + max_tokens > limits.max_model_len:
        raise ContextLengthError(
            f"the maximum context length is {limits.max_model_len} tokens, but the prompt has "
            f"{length} and max_tokens is {max_tokens}",
            "prompt",
        )
    in_cache = max(length + max_tokens - 1, length)  # the last token is never read
    need = -(-in_cache // limits.block_size)
    if need > limits.num_blocks:
        raise ContextLengthError(
            f"prompt ({length} tokens) and max_tokens ({max_tokens}) need {need} KV blocks of "
            f"{limits.block_size} tokens, this worker has {limits.num_blocks}",
            "prompt",
        )


def _require(ok: bool, message: str, param: str) -> None:
    if not ok:
        raise RequestError(message, param)
