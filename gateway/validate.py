"""What a generate call may ask for: the one place for ranges, limits and defaults.

``check_fields`` needs no model and runs first; ``finish_call`` checks against the model, fills in
defaults and draws seeds. Nothing is allocated for a call before both have passed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cluster.config import GatewaySection
from cluster.errors import ContextLengthError, RequestError, UnsupportedParameterError
from gateway.call import CallKind, CallPrompt, ChatInput, GenerateCall, GenerateFields
from gateway.chat_template import RESERVED_VARIABLES
from gateway.model import ModelFacts
from workers.request import SamplingParams

DEFAULT_MAX_TOKENS = 16
"""New tokens of a completion that says nothing."""
MAX_LOGIT_BIAS_ENTRIES = 1024
"""Entries of ``logit_bias``."""
MAX_STOP_TOKEN_IDS = 1024
"""Entries of ``stop_token_ids``."""
MAX_LOGPROB_ENTRIES = 4_000_000
"""Log-probabilities that one call may ask for in all."""
_INT64 = 2**63


def check_fields(fields: GenerateFields, limits: GatewaySection) -> None:
    """Check all that does not depend on the model.

    Raises:
        RequestError: names the field, its value and the limit.
        UnsupportedParameterError: for a field that is not built.
    """
    if fields.priority:
        raise UnsupportedParameterError("priority is not supported", "priority")
    _check_counts(fields, limits)
    _check_sampling(fields)
    _check_stops(fields, limits)
    _check_range(fields.logprobs_name, fields.logprobs, 0, limits.max_logprobs)
    if fields.chat is not None:
        check_chat(fields.chat)


def finish_call(
    fields: GenerateFields,
    prompts: Sequence[tuple[str | None, tuple[int, ...]]],
    model: ModelFacts,
    draw_seed: Callable[[], int],
) -> GenerateCall:
    """The validated call.

    Args:
        fields: checked by ``check_fields``.
        prompts: (text or None, token ids) of each prompt.
        model: limits of the served model.
        draw_seed: makes a seed for each prompt where the client gave none.

    Raises:
        RequestError: a token id outside the vocabulary, or a prompt without tokens.
        ContextLengthError: prompt and output do not fit.
    """
    check_token_ids("stop_token_ids", fields.stop_token_ids, model.vocab_size)
    check_token_ids("logit_bias", [token for token, _ in fields.logit_bias], model.vocab_size)
    _check_leaves_tokens(fields, model)
    field = "messages" if fields.kind is CallKind.CHAT else "prompt"
    for _, ids in prompts:
        _require(len(ids) > 0, field, f"{field} must not be empty")
        check_token_ids(field, ids, model.vocab_size)
    n = fields.n or 1
    finished = tuple(
        CallPrompt(
            ids=ids,
            text=text,
            params=_make_params(
                fields,
                max_tokens=_max_tokens(fields, len(ids), model),
                seed=draw_seed() if fields.seed is None else fields.seed,
            ),
        )
        for text, ids in prompts
    )
    _check_logprob_entries(fields, finished, n)
    return GenerateCall(
        kind=fields.kind,
        model=fields.model or model.name,
        prompts=finished,
        n=n,
        stop=fields.stop,
        include_stop_str_in_output=bool(fields.include_stop_str_in_output),
        skip_special_tokens=fields.skip_special_tokens is not False,
        logprobs=fields.logprobs,
        echo=fields.echo,
        token_ids_only=fields.token_ids_only,
        return_token_ids=fields.return_token_ids,
    )


def check_token_ids(name: str, ids: Sequence[int], vocab_size: int) -> None:
    """Raise ``RequestError`` for an id outside the vocabulary."""
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        wrong = next(i for i in ids if not 0 <= i < vocab_size)
        message = f"{name}: token id {wrong} is not in the vocabulary (0 to {vocab_size - 1})"
        raise RequestError(message, name)


def _check_leaves_tokens(fields: GenerateFields, model: ModelFacts) -> None:
    """``min_tokens`` masks what would end the text: some other token must be there."""
    ending = set(fields.stop_token_ids)
    if not fields.ignore_eos:
        ending.update(model.eos_token_ids)
    _require(
        not fields.min_tokens or len(ending) < model.vocab_size,
        "stop_token_ids",
        f"stop_token_ids leave no token of the vocabulary ({model.vocab_size}) for min_tokens",
    )


def check_context(num_tokens: int, max_tokens: int, model: ModelFacts, name: str) -> None:
    """Raise ``ContextLengthError`` if a prompt with ``max_tokens`` new tokens does not fit."""
    total = num_tokens + max_tokens
    if total > model.max_model_len:
        raise ContextLengthError(
            f"This model's maximum context length is {model.max_model_len} tokens. However, you "
            f"requested {total} tokens ({num_tokens} in the prompt, {max_tokens} for the output).",
            name,
        )
    if 0 < model.max_kv_tokens < total:
        raise ContextLengthError(
            f"This server's maximum context length is {model.max_kv_tokens} tokens (its KV cache). "
            f"However, you requested {total} tokens ({num_tokens} in the prompt, {max_tokens} for "
            "the output).",
            name,
        )


def _require(ok: bool, name: str, message: str) -> None:
    if not ok:
        raise RequestError(message, name)


def _check_counts(fields: GenerateFields, limits: GatewaySection) -> None:
    _check_range("n", fields.n, 1, limits.max_n)
    name, wanted = fields.max_tokens_name, fields.max_tokens
    if wanted is not None:
        least = 0 if fields.echo else 1
        note = "" if fields.echo or wanted else " (0 needs echo)"
        _require(wanted >= least, name, f"{name} ({wanted}) must be at least {least}{note}")
    if fields.min_tokens is not None:
        least_new = fields.min_tokens
        _require(least_new >= 0, "min_tokens", f"min_tokens ({least_new}) must not be negative")
        if wanted is not None:
            _require(
                least_new <= wanted,
                "min_tokens",
                f"min_tokens ({least_new}) must not exceed {name} ({wanted})",
            )
    if fields.kind is CallKind.COMPLETION:
        _check_prompts(fields, limits)


def _check_prompts(fields: GenerateFields, limits: GatewaySection) -> None:
    count, most = len(fields.prompts), min(limits.max_batch_prompts, limits.max_queue)
    _require(count > 0, "prompt", "prompt must not be empty")
    _require(count <= most, "prompt", f"prompt has {count} entries, at most {most} are allowed")
    choices = count * (fields.n or 1)
    _require(
        choices <= limits.max_choices,
        "n",
        f"prompts times n ({choices}) must be at most {limits.max_choices}",
    )
    for prompt in fields.prompts:
        _require(len(prompt) > 0, "prompt", "prompt must not be empty")


def _check_sampling(fields: GenerateFields) -> None:
    _check_range("temperature", fields.temperature, 0, 100)
    _check_range("top_p", fields.top_p, 0, 1, above=True)
    _check_range("min_p", fields.min_p, 0, 1)
    _check_range("top_k", fields.top_k, -1, _INT64 - 1)
    _check_range("frequency_penalty", fields.frequency_penalty, -2, 2)
    _check_range("presence_penalty", fields.presence_penalty, -2, 2)
    _check_range("repetition_penalty", fields.repetition_penalty, 0, 2, above=True)
    _check_range("seed", fields.seed, -_INT64, _INT64 - 1)
    count = len(fields.logit_bias)
    _require(
        count <= MAX_LOGIT_BIAS_ENTRIES,
        "logit_bias",
        f"logit_bias has {count} entries, at most {MAX_LOGIT_BIAS_ENTRIES} are allowed",
    )
    for _, bias in fields.logit_bias:
        _check_range("logit_bias", bias, -100, 100)


def _check_stops(fields: GenerateFields, limits: GatewaySection) -> None:
    count, most = len(fields.stop), limits.max_stop_strings
    _require(count <= most, "stop", f"stop has {count} strings, at most {most} are allowed")
    for stop in fields.stop:
        _require(len(stop) > 0, "stop", "stop must not contain an empty string")
        _require(
            len(stop) <= limits.max_stop_chars,
            "stop",
            f"stop has a string of {len(stop)} characters, at most {limits.max_stop_chars} "
            "are allowed",
        )
    _require(
        not (fields.stop and fields.token_ids_only), "stop", "stop cannot go with token_ids_only"
    )
    count = len(fields.stop_token_ids)
    _require(
        count <= MAX_STOP_TOKEN_IDS,
        "stop_token_ids",
        f"stop_token_ids has {count} entries, at most {MAX_STOP_TOKEN_IDS} are allowed",
    )


def check_chat(chat: ChatInput) -> None:
    """Raise ``RequestError`` for a conversation that cannot be rendered."""
    _require(len(chat.messages) > 0, "messages", "messages must not be empty")
    _require(
        not (chat.continue_final_message and chat.add_generation_prompt),
        "continue_final_message",
        "continue_final_message and add_generation_prompt cannot both be true",
    )
    reserved = sorted(RESERVED_VARIABLES.intersection(chat.template_kwargs))
    _require(
        not reserved,
        "chat_template_kwargs",
        f"chat_template_kwargs must not set {', '.join(reserved)}",
    )


def _check_range(
    name: str, value: float | None, low: float, high: float, above: bool = False
) -> None:
    """``low <= value <= high``, or ``low < value`` with ``above``; NaN never fits."""
    if value is None:
        return
    is_inside = (value > low if above else value >= low) and value <= high
    bounds = f"{'above' if above else 'at least'} {low} and at most {high}"
    shown = str(value) if len(str(value)) <= 32 else f"{str(value)[:32]}..."
    _require(is_inside, name, f"{name} ({shown}) must be {bounds}")


def _max_tokens(fields: GenerateFields, num_tokens: int, model: ModelFacts) -> int:
    name = "messages" if fields.kind is CallKind.CHAT else "prompt"
    if fields.max_tokens is not None:
        prompt_only = num_tokens >= model.context_tokens
        check_context(
            num_tokens, fields.max_tokens, model, name if prompt_only else fields.max_tokens_name
        )
        return fields.max_tokens
    check_context(num_tokens, max(1, fields.min_tokens or 0), model, name)
    room = model.context_tokens - num_tokens
    if fields.kind is CallKind.CHAT:
        return room
    return min(max(DEFAULT_MAX_TOKENS, fields.min_tokens or 0), room)


def _make_params(fields: GenerateFields, max_tokens: int, seed: int) -> SamplingParams:
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=fields.min_tokens or 0,
        temperature=_or(fields.temperature, 1.0),
        top_p=_or(fields.top_p, 1.0),
        top_k=min(max(fields.top_k or 0, 0), 2**31 - 1),
        min_p=_or(fields.min_p, 0.0),
        repetition_penalty=_or(fields.repetition_penalty, 1.0),
        frequency_penalty=_or(fields.frequency_penalty, 0.0),
        presence_penalty=_or(fields.presence_penalty, 0.0),
        logit_bias=fields.logit_bias,
        stop_token_ids=fields.stop_token_ids,
        ignore_eos=bool(fields.ignore_eos),
        seed=seed,
        logprobs=fields.logprobs,
        prompt_logprobs=fields.logprobs if fields.echo else None,
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else float(value)


def _check_logprob_entries(fields: GenerateFields, prompts: Sequence[CallPrompt], n: int) -> None:
    if fields.logprobs is None:
        return
    echoed = 1 if fields.echo else 0
    tokens = sum(n * (p.params.max_tokens + echoed * len(p.ids)) for p in prompts)
    entries = tokens * (fields.logprobs + 1)
    _require(
        entries <= MAX_LOGPROB_ENTRIES,
        fields.logprobs_name,
        f"{fields.logprobs_name} times tokens times choices ({entries}) must be at most "
        f"{MAX_LOGPROB_ENTRIES}",
    )
