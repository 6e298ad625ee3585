"""Checks a call against the served model, and makes its engine requests with defaults and seeds.

``field_checks.check_fields`` runs before this module. No memory is allocated for a call before all
checks pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from msgspec.structs import replace

from cluster.core.errors import ContextLengthError, RequestError
from gateway.core.call import CallKind, GenerateCall
from gateway.core.field_checks import require
from gateway.core.model import ModelFacts
from workers.requests.request import BeamParams, EarlyStopping, Request, SamplingParams

DEFAULT_MAX_TOKENS = 16
"""Default ``max_tokens`` of a completion; a larger ``min_tokens`` replaces it."""
MAX_LOGPROB_ENTRIES = 4_000_000
"""Maximum number of log-probabilities that the engines may return for one call."""
MAX_BEAM_LOGPROB_ENTRIES = 1_000_000
"""Maximum number of log-probabilities of a beam search, whose output is one message."""
_SLICE = 65_536
"""Number of token ids that are checked at a time."""
_SAMPLED = (
    *("min_tokens", "temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty"),
    *("presence_penalty", "logit_bias", "stop_token_ids", "ignore_eos", "logprob_token_ids"),
    "grammar",
)
"""Fields of a call that are copied to ``SamplingParams``, whose defaults apply to unset fields."""


def make_requests(
    call: GenerateCall,
    prompts: Sequence[tuple[int, ...]],
    model: ModelFacts,
    draw_seed: Callable[[], int],
    bad_words: Sequence[tuple[int, ...]] = (),
) -> list[Request]:
    """Make the engine requests of a call, one per prompt; ``complete_requests`` adds ids later.

    Args:
        call: the call, after ``check_fields``.
        prompts: token ids of each prompt.
        model: limits of the served model.
        draw_seed: makes a seed for each prompt if the client has set none.
        bad_words: token sequences of ``call.bad_words``.

    Raises:
        RequestError: a token id is outside the vocabulary, or a prompt is empty.
        ContextLengthError: prompt and output exceed the context.
    """
    _check_ids(call, bad_words, model)
    _check_num_beams(call, model)
    field = "messages" if call.kind is CallKind.CHAT else call.prompt_name
    check_prompts(field, prompts, model)
    if call.embeds is not None and model.shape is not None:
        width, name = model.shape.hidden_size, "embeddings"
        rule = f"have width {call.embeds.width}, the model needs {width}"
        require(call.embeds.width == width, name, rule)
    params = _make_params(call, tuple(bad_words))
    requests = [
        Request(
            prompt=ids,
            prompt_embeds=call.embeds,
            params=replace(
                params,
                max_tokens=_max_tokens(call, len(ids), model),
                seed=draw_seed() if call.seed is None else call.seed,
            ),
        )
        for ids in prompts
    ]
    _check_logprob_entries(call, requests)
    return requests


def truncation_slice(call: GenerateCall, model: ModelFacts) -> slice | None:
    """Return the part of a prompt's tokens that ``truncate_prompt_tokens`` of a call keeps.

    None if the field is not set; -1 keeps as many tokens as the context allows.
    """
    wanted = call.truncate_prompt_tokens
    if wanted is None:
        return None
    output = call.max_tokens if call.max_tokens is not None else max(1, call.min_tokens or 0)
    room = max(1, model.context_tokens - output)
    kept = room if wanted == -1 else wanted
    return slice(kept) if call.truncation_side == "right" else slice(-kept, None)


def check_prompts(name: str, prompts: Sequence[Sequence[int]], model: ModelFacts) -> None:
    """Raise ``RequestError`` for an empty prompt, or for a token id outside the vocabulary.

    ``name`` is the client's field, for the error message.
    """
    for ids in prompts:
        require(len(ids) > 0, name, "must not be empty")
        check_token_ids(name, ids, model.vocab_size)


def check_token_ids(name: str, ids: Sequence[int], vocab_size: int) -> None:
    """Raise ``RequestError`` for a token id outside the vocabulary; ``name`` is the client's field.

    Ids are checked in slices so that other threads can run; a million ids take 20 ms.
    """
    for start in range(0, len(ids), _SLICE):
        part = ids[start : start + _SLICE]
        if min(part) < 0 or max(part) >= vocab_size:
            wrong = next(i for i in part if not 0 <= i < vocab_size)
            message = f"{name}: token id {wrong} is not in the vocabulary (0 to {vocab_size - 1})"
            raise RequestError(message, name)


def _check_ids(call: GenerateCall, bad_words: Sequence[tuple[int, ...]], model: ModelFacts) -> None:
    """Raise ``RequestError`` for token ids of a call outside the vocabulary, except in prompts."""
    allowed, size = call.allowed_token_ids or (), model.vocab_size
    check_token_ids("stop_token_ids", call.stop_token_ids, size)
    rule = f"has {len(allowed)} entries, the vocabulary has {size}"
    require(len(allowed) <= size, "allowed_token_ids", rule)
    check_token_ids("allowed_token_ids", allowed, size)
    check_token_ids("logprob_token_ids", call.logprob_token_ids, size)
    for word in bad_words:
        check_token_ids("bad_words", word, size)
    check_token_ids("logit_bias", [token for token, _ in call.logit_bias], size)
    _check_leaves_tokens(call, model)


def _check_leaves_tokens(call: GenerateCall, model: ModelFacts) -> None:
    """Raise ``RequestError`` if ``min_tokens``, which forbids end tokens, leaves no other token."""
    ending = set(call.stop_token_ids)
    if not call.ignore_eos:
        ending.update(model.eos_token_ids)
    name, left = "stop_token_ids", model.vocab_size - len(ending)
    if call.allowed_token_ids is not None:
        name, left = "allowed_token_ids", len(set(call.allowed_token_ids) - ending)
    rule = f"leave no token of the vocabulary ({model.vocab_size}) for min_tokens"
    require(not call.min_tokens or left > 0, name, rule)


def _check_num_beams(call: GenerateCall, model: ModelFacts) -> None:
    """Raise ``RequestError`` if a beam search has more beams than there are possible first tokens.

    Each beam needs a different first token that does not end the text.
    """
    most = model.vocab_size - len({*call.stop_token_ids, *model.eos_token_ids})
    name, width = "n" if call.best_of is None else "best_of", call.num_sampled
    rule = f"({width}) must be at most {most} with use_beam_search (possible first tokens)"
    require(not call.use_beam_search or width <= most, name, rule)


def check_context(num_tokens: int, max_tokens: int, model: ModelFacts, name: str) -> None:
    """Raise ``ContextLengthError`` if a prompt with ``max_tokens`` new tokens exceeds the context.

    The limits are those of the model and of the KV cache. ``name`` is the client's field, for the
    error message.
    """
    total = num_tokens + max_tokens
    if total <= model.max_model_len and not 0 < model.max_kv_tokens < total:
        return
    limit = f"This model's maximum context length is {model.max_model_len} tokens"
    if total <= model.max_model_len:
        limit = (
            f"This server's maximum context length is {model.max_kv_tokens} tokens (its KV cache)"
        )
    raise ContextLengthError(
        f"{limit}. However, you requested {total} tokens ({num_tokens} in the prompt, "
        f"{max_tokens} for the output).",
        name,
    )


def _max_tokens(call: GenerateCall, num_tokens: int, model: ModelFacts) -> int:
    name = "messages" if call.kind is CallKind.CHAT else call.prompt_name
    if call.max_tokens is not None and not call.fits_context:
        prompt_only = num_tokens >= model.context_tokens
        check_context(
            num_tokens, call.max_tokens, model, name if prompt_only else call.max_tokens_name
        )
        return call.max_tokens
    check_context(num_tokens, max(1, call.min_tokens or 0), model, name)
    room = model.context_tokens - num_tokens
    if call.max_tokens is not None:
        return min(call.max_tokens, room)
    if call.kind is CallKind.CHAT:
        return room
    return min(max(DEFAULT_MAX_TOKENS, call.min_tokens or 0), room)


def _num_sampled_logprobs(call: GenerateCall) -> int | None:
    """Return how many alternatives the engine reports for each new token; None for no logprobs.

    Ranked choices need at least 0: the log-probability of the sampled token.
    """
    wanted, ranks_here = call.num_logprobs, call.is_ranked and not call.use_beam_search
    return 0 if wanted is None and ranks_here else wanted


def _num_prompt_logprobs(call: GenerateCall) -> int | None:
    """Return how many alternatives the engine reports per prompt token; None for no logprobs."""
    echoed = call.logprobs if call.echo else None
    counts = [count for count in (echoed, call.prompt_logprobs) if count is not None]
    return max(counts, default=None)


def _make_params(call: GenerateCall, bad_words: tuple[tuple[int, ...], ...]) -> SamplingParams:
    """Make the sampling parameters that all prompts of a call share.

    Token limit and seed, which may differ by prompt, are left at their defaults.
    """
    given: dict[str, Any] = {
        name: value for name in _SAMPLED if (value := getattr(call, name)) is not None
    }
    if call.stops_in_answer:
        given["stop_token_ids"] = ()  # the gateway checks them, outside of reasoning
    if call.use_beam_search:
        given |= {"beams": _beams(call), "temperature": 0.0}
    return SamplingParams(
        **given,
        top_k=min(max(call.top_k or 0, 0), 2**31 - 1),
        logprobs=_num_sampled_logprobs(call),
        prompt_logprobs=_num_prompt_logprobs(call),
        allowed_token_ids=tuple(sorted(set(call.allowed_token_ids or ()))),
        bad_words=bad_words,
    )


def _beams(call: GenerateCall) -> BeamParams:
    penalty, stops = call.length_penalty, call.early_stopping
    given: dict[str, Any] = {} if penalty is None else {"length_penalty": penalty}
    return BeamParams(**given, early_stopping=EarlyStopping(stops or "false"))


def _check_logprob_entries(call: GenerateCall, requests: Sequence[Request]) -> None:
    new, of_prompt = _num_sampled_logprobs(call), _num_prompt_logprobs(call)
    entries = call.num_sampled * sum(
        one.params.max_tokens * (0 if new is None else new + 1)
        + len(one.prompt) * (0 if of_prompt is None else of_prompt + 1)
        for one in requests
    )
    name = call.logprobs_name if new is not None else "prompt_logprobs"
    most = MAX_BEAM_LOGPROB_ENTRIES if call.use_beam_search else MAX_LOGPROB_ENTRIES
    rule = f"times tokens times choices ({entries}) must be at most {most}"
    require(entries <= most, name, rule)
