"""Validation of a request before an engine allocates anything for it. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from cluster.config.cluster import EngineSection
from cluster.core.errors import ContextLengthError, QueueFullError, RequestError
from workers.model.config import ModelConfig
from workers.requests.prompt_embeds import PromptEmbeds
from workers.requests.request import Request


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestLimits:
    """Limits of one engine that a request must respect."""

    vocab_size: int
    """Size of the vocabulary; token ids must be less."""
    max_model_len: int
    """Maximum tokens of prompt and output together."""
    block_size: int
    """Number of tokens in a KV block."""
    num_blocks: int
    eos_token_ids: tuple[int, ...] = ()
    """End-of-sequence tokens of the model."""
    hidden_size: int = 0
    """Number of elements of an embedding; 0 if unknown."""
    is_classifier: bool = False
    """Whether the model is a classifier without lm_head, which cannot sample or score tokens."""

    @classmethod
    def of(
        cls, config: ModelConfig, section: EngineSection, max_model_len: int, num_blocks: int
    ) -> Self:
        """Return the limits of a model in an engine with ``num_blocks`` KV blocks."""
        return cls(
            vocab_size=config.vocab_size,
            eos_token_ids=tuple(config.eos_token_ids),
            max_model_len=max_model_len,
            block_size=section.block_size_tokens,
            num_blocks=num_blocks,
            hidden_size=config.hidden_size,
            is_classifier=bool(config.labels),
        )


def check_request(request: Request, limits: RequestLimits) -> None:
    """Check that an engine can run a request at some time.

    Raises ``RequestError``, which names field, value and rule, for a request that can never run.
    """
    params, length = request.params, len(request.prompt)
    _require(length > 0, "prompt must not be empty", "prompt")
    if request.prompt_embeds is not None:
        _check_embeds(request, request.prompt_embeds, limits)
    _require(request.n >= 1, f"n ({request.n}) must be at least 1", "n")
    _require(
        len(request.output_so_far) <= request.n,
        f"output_so_far has {len(request.output_so_far)} choices, n is {request.n}",
        "output_so_far",
    )
    closed = set(request.closed_choices)
    _require(
        len(closed) < request.n and closed <= set(range(request.n)),
        f"closed_choices {sorted(closed)} must be some of the {request.n} choices, not all",
        "closed_choices",
    )
    _require(
        params.max_tokens >= 0,
        f"max_tokens ({params.max_tokens}) must not be negative",
        "max_tokens",
    )
    if limits.is_classifier:
        _check_classification(request)
    tokens_by_field = {
        "prompt": request.prompt,
        "output_so_far": [t for tokens in request.output_so_far for t in tokens],
        "logit_bias": [t for t, _ in params.logit_bias],
        "stop_token_ids": params.stop_token_ids,
        "allowed_token_ids": params.allowed_token_ids,
        "logprob_token_ids": params.logprob_token_ids,
        "bad_words": [t for word in params.bad_words for t in word],
    }
    for name, tokens in tokens_by_field.items():
        bad = next((t for t in tokens if not 0 <= t < limits.vocab_size), None)
        _require(
            bad is None,
            f"{name} has token id {bad}, ids must be 0 to {limits.vocab_size - 1}",
            name,
        )
    if params.beams is not None:
        _check_beams(request, limits)
    _check_length(length, params.max_tokens, limits)


def _check_embeds(request: Request, embeds: PromptEmbeds, limits: RequestLimits) -> None:
    name, params = "embeddings", request.params
    width = limits.hidden_size
    _require(embeds.width == width, f"{name} are {embeds.width} wide, the model's {width}", name)
    is_whole = len(embeds.data) == 4 * width * len(request.prompt)
    _require(is_whole, f"{name} must have one row for each token of the prompt", name)
    is_plain = params.prompt_logprobs is None and params.repetition_penalty == 1.0
    _require(
        is_plain, f"{name} cannot be combined with prompt_logprobs or repetition_penalty", name
    )


def _check_beams(request: Request, limits: RequestLimits) -> None:
    params = request.params
    rule = f"max_tokens ({params.max_tokens}) must be at least 1 for beams"
    _require(params.max_tokens > 0, rule, "max_tokens")
    max_beams = limits.vocab_size - len({*params.stop_token_ids, *limits.eos_token_ids})
    rule = f"n ({request.n}) must be at most {max_beams} for beams, the number of first tokens"
    _require(request.n <= max_beams, rule, "n")
    name = "output_so_far"
    _require(not any(request.output_so_far), f"{name} must be empty for beams", name)


def _check_classification(request: Request) -> None:
    params, rule = request.params, "the model is a sequence classifier and has no lm_head"
    _require(
        params.max_tokens == 0, f"max_tokens ({params.max_tokens}) must be 0: {rule}", "max_tokens"
    )
    _require(params.prompt_logprobs is None, f"prompt_logprobs must not be set: {rule}", "logprobs")


def _check_length(length: int, max_tokens: int, limits: RequestLimits) -> None:
    if length + max_tokens > limits.max_model_len:
        raise ContextLengthError(
            f"the maximum context length is {limits.max_model_len} tokens, but the prompt has "
            f"{length} and max_tokens is {max_tokens}",
            "prompt",
        )
    in_cache = max(length + max_tokens - 1, length)  # the last token is not cached
    need = -(-in_cache // limits.block_size)
    if need > limits.num_blocks:
        raise ContextLengthError(
            f"prompt ({length} tokens) and max_tokens ({max_tokens}) need {need} KV blocks of "
            f"{limits.block_size} tokens, this worker has {limits.num_blocks}",
            "prompt",
        )


def check_queue_limits(request: Request, section: EngineSection, waiting: int, tokens: int) -> None:
    """Check that a request fits into the queue; an empty queue accepts every request.

    ``waiting`` and ``tokens``: sequences and prompt tokens that already wait. Raises
    ``QueueFullError`` if a limit of ``section`` would be exceeded.
    """
    limit, max_tokens = section.max_waiting, section.max_waiting_tokens
    if waiting and waiting + request.n > limit:
        raise QueueFullError(f"{waiting} sequences are waiting, at most {limit} (max_waiting) may")
    if max_tokens is not None and tokens and tokens + len(request.prompt) > max_tokens:
        raise QueueFullError(
            f"{tokens} prompt tokens are waiting, at most {max_tokens} (max_waiting_tokens) may"
        )


def _require(ok: bool, message: str, param: str) -> None:
    if not ok:
        raise RequestError(message, param)
