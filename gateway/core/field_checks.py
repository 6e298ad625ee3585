"""Checks of a call's fields, alone and in combination, that do not depend on the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.config.gateway import GatewaySection
from cluster.core.errors import RequestError, UnsupportedParameterError
from gateway.core.call import CallKind, ChatInput, GenerateCall

RESERVED_VARIABLES = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}
)
"""Template variables that ``chat_template_kwargs`` must not set."""
MAX_NAME_CHARS = 256
"""Maximum length of ``cache_salt`` and of session ids."""
MAX_MESSAGES = 16_384
MAX_PARTS = 65_536
"""Maximum total number of fields, content parts and tool calls of all messages."""
Neutral = Mapping[str, tuple[object, ...]]
"""Known but unsupported fields, with values that have no effect; null never has an effect."""


@dataclass(frozen=True, slots=True)
class Range:
    """Allowed range of a number."""

    low: float
    high: float | str
    """Maximum value, or the name of an option in ``GatewaySection``."""
    above: bool = False
    """Whether ``low`` is excluded."""


RANGES: Mapping[str, Range] = {
    "n": Range(1, "max_n"),
    "best_of": Range(1, "max_n"),
    "length_penalty": Range(-10, 10),
    "temperature": Range(0, 100),
    "top_p": Range(0, 1, above=True),
    "min_p": Range(0, 1),
    "top_k": Range(-1, 2**63 - 1),
    "frequency_penalty": Range(-2, 2),
    "presence_penalty": Range(-2, 2),
    "repetition_penalty": Range(0, 2, above=True),
    "seed": Range(-(2**63), 2**63 - 1),
    "priority": Range(-(2**31), 2**31 - 1),
    "prompt_logprobs": Range(0, "max_logprobs"),
    "cache_ttl": Range(0, "max_cache_ttl_s"),
}
"""Ranges of numeric fields. None is always accepted; NaN is never accepted."""
_BIAS = Range(-100, 100)
_MOST_TOKENS = 2**63 - 1
"""Maximum of ``max_tokens`` and ``min_tokens``. Sums with larger numbers could have more than 4300
digits, and Python does not convert them to the text of an error."""
_MAX_METADATA, _MAX_KEY_CHARS, _MAX_VALUE_CHARS = 16, 64, 512
_UNSUPPORTED_WITH_BEAMS: Mapping[str, tuple[object, ...]] = {
    "temperature": (0, 1),
    "top_p": (1,),
    "top_k": (-1, 0),
    "min_p": (0,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ((),),
    "allowed_token_ids": (),
    "bad_words": ((),),
    "stop": ((),),
    "grammar": (),
    "tools": (),
    "prompt_logprobs": (),
    "logprob_token_ids": ((),),
}
"""Fields that a beam search does not support, each with the values that have no effect. The engine
ranks beams by the model's own probabilities, and has no text."""
MAX_ENTRIES: Mapping[str, int] = {
    "logit_bias": 1024,
    "stop_token_ids": 1024,
    "bad_words": 1024,
    "logprob_token_ids": 128,
}


def check_fields(call: GenerateCall, limits: GatewaySection) -> None:
    """Check all fields that do not depend on the model.

    Raises:
        RequestError: a field is invalid; the error names it, its value and the limit.
    """
    for name, bounds in RANGES.items():
        check_range(name, getattr(call, name), bounds, limits)
    for name, most in MAX_ENTRIES.items():
        check_length(name, len(getattr(call, name)), most)
    for _, bias in call.logit_bias:
        check_range("logit_bias", bias, _BIAS)
    check_cache_salt(call.cache_salt)
    _check_name("session_id", call.session_id)
    _check_name("prompt_cache_key", call.prompt_cache_key)
    _check_counts(call)
    if call.kind is CallKind.COMPLETION:
        _check_prompts(call, limits)
    _check_stops(call, limits)
    _check_logprobs(call, limits)
    _check_masks(call, limits)
    _check_truncation(call)
    _check_beams(call)
    if call.chat is not None:
        check_chat(call.chat)


def require(ok: bool, name: str, rule: str) -> None:
    """Raise ``RequestError`` with the text ``name`` ``rule`` unless ``ok``."""
    if not ok:
        raise RequestError(f"{name} {rule}", name)


def check_length(name: str, count: int, most: int, noun: str = "entries") -> None:
    """Raise ``RequestError`` if the field ``name`` has more than ``most`` entries (``noun``)."""
    require(count <= most, name, f"has {count} {noun}, at most {most} are allowed")


def check_batch(name: str, count: int, most: int) -> None:
    """Raise ``RequestError`` unless there are 1 to ``most`` prompts."""
    require(count > 0, name, "must not be empty")
    check_length(name, count, most)


def check_messages(count: int, num_parts: int) -> None:
    """Raise ``RequestError`` for too many messages or parts of messages (``MAX_PARTS``)."""
    check_length("messages", count, MAX_MESSAGES)
    rule = f"have {num_parts} fields, parts and calls, at most {MAX_PARTS} are allowed"
    require(num_parts <= MAX_PARTS, "messages", rule)


def check_metadata(metadata: Mapping[str, str]) -> None:
    """Raise ``RequestError`` for more or longer entries than OpenAI's protocol allows."""
    check_length("metadata", len(metadata), _MAX_METADATA)
    for key, value in metadata.items():
        rule = f"has a key of {len(key)} characters, at most {_MAX_KEY_CHARS} are allowed"
        require(len(key) <= _MAX_KEY_CHARS, "metadata", rule)
        rule = f"has a value of {len(value)} characters, at most {_MAX_VALUE_CHARS} are allowed"
        require(len(value) <= _MAX_VALUE_CHARS, f"metadata.{key}", rule)


def refuse_unsupported(data: Mapping[str, Any], unsupported: Neutral, path: str = "") -> None:
    """Raise ``UnsupportedParameterError`` for the first unsupported field that has an effect.

    ``path`` is the prefix of the field's name in the error.
    """
    for name, neutral in unsupported.items():
        value = data.get(name)
        if value is not None and not any(type(value) is type(n) and value == n for n in neutral):
            raise UnsupportedParameterError(f"{path}{name} is not supported", path + name)


def require_one_of(**values: object) -> str:
    """Return the name of the only field that is set.

    Raises:
        RequestError: no field, or more than one, is set.
    """
    names, all_names = [name for name in values if values[name] is not None], " and ".join(values)
    if not names:
        message = f"one of {all_names} is required"
        raise RequestError(message, next(iter(values)), "missing_required_parameter")
    if len(names) > 1:
        raise RequestError(f"{all_names} cannot be set together", names[0])
    return names[0]


def _check_counts(call: GenerateCall) -> None:
    if call.is_ranked and call.kind is CallKind.CHAT:
        raise UnsupportedParameterError("best_of is not supported", "best_of")
    drawn, returned = call.num_sampled, call.num_returned
    require(drawn >= returned, "best_of", f"({drawn}) must be at least n ({returned})")
    name, wanted, least = call.max_tokens_name, call.max_tokens, call.min_tokens
    if wanted is not None:
        bound = 0 if call.echo else 1
        note = "" if call.echo or wanted else " (0 needs echo)"
        require(wanted >= bound, name, f"({wanted}) must be at least {bound}{note}")
        check_range(name, wanted, Range(bound, _MOST_TOKENS))
    if least is not None:
        require(least >= 0, "min_tokens", f"({least}) must not be negative")
        check_range("min_tokens", least, Range(0, _MOST_TOKENS))
        rule = f"({least}) must not exceed {name} ({wanted})"
        require(wanted is None or least <= wanted, "min_tokens", rule)


def _check_beams(call: GenerateCall) -> None:
    if not call.use_beam_search:
        wanted, stops = call.length_penalty, call.early_stopping
        rule = "needs use_beam_search to be true"
        require(wanted in (None, 1), "length_penalty", f"({wanted}) {rule}")
        require(stops in (None, "false"), "early_stopping", f"({str(stops)[:32]}) {rule}")
        return
    stops, rule = call.early_stopping, "must be false, true or never"
    is_known = stops in (None, "false", "true", "never")
    require(is_known, "early_stopping", f"({str(stops)[:32]!r}) {rule}")
    named = {"stop": call.stop_name, "grammar": call.grammar and call.grammar.field}
    for name, neutral in _UNSUPPORTED_WITH_BEAMS.items():
        value = getattr(call, name)
        ok = value is None or value in neutral
        require(ok, named.get(name) or name, "cannot be used with use_beam_search")
    scores_prompt = call.echo and call.logprobs is not None
    require(not scores_prompt, "echo", "with logprobs cannot be used with use_beam_search")
    rule = "(0) must be at least 1 with use_beam_search"
    require(call.max_tokens != 0, call.max_tokens_name, rule)


def check_stream(call: GenerateCall) -> None:
    """Raise ``RequestError`` if a streamed call has choices that are known only at its end."""
    require(not call.use_beam_search, "use_beam_search", "cannot be used with a stream")
    is_ranked = call.kind is CallKind.COMPLETION and call.num_sampled > call.num_returned
    require(not is_ranked, "best_of", "cannot be used with a stream")


def _check_prompts(call: GenerateCall, limits: GatewaySection) -> None:
    count, most = len(call.prompts), min(limits.max_batch_prompts, limits.max_queue)
    field = call.prompt_name
    check_batch(field, count, most)
    name = "n" if call.best_of is None else "best_of"
    choices, most = count * call.num_sampled, limits.max_choices
    if choices > most:
        raise RequestError(f"prompts times {name} ({choices}) must be at most {most}", name)
    for prompt in call.prompts:
        require(len(prompt) > 0, field, "must not be empty")


def _check_stops(call: GenerateCall, limits: GatewaySection) -> None:
    name = call.stop_name
    check_length(name, len(call.stop), limits.max_stop_strings, "strings")
    _check_texts(name, "string", call.stop, limits)
    require(not (call.stop and call.token_ids_only), name, "cannot be used with token_ids_only")


def _check_texts(name: str, noun: str, texts: Sequence[str], limits: GatewaySection) -> None:
    most = limits.max_stop_chars
    for text in texts:
        rule = f"has a {noun} of {len(text)} characters, at most {most} are allowed"
        require(len(text) > 0, name, f"must not contain an empty {noun}")
        require(len(text) <= most, name, rule)


def check_cache_salt(salt: str | None) -> None:
    """Raise ``RequestError`` for an empty or too long salt."""
    _check_name("cache_salt", salt)


def _check_name(field: str, name: str | None) -> None:
    if name is None:
        return
    require(len(name) > 0, field, "must not be empty")
    check_length(field, len(name), MAX_NAME_CHARS, "characters")


def _check_logprobs(call: GenerateCall, limits: GatewaySection) -> None:
    name, wanted = call.logprobs_name, call.logprobs
    field, count = "logprob_token_ids", len(call.logprob_token_ids)
    if not count:
        check_range(name, wanted, RANGES["prompt_logprobs"], limits)
        return
    is_unique = len(set(call.logprob_token_ids)) == count
    require(is_unique, field, "must not name a token twice")
    rule = f"{name} ({wanted}) must be the same or unset"
    require(wanted in (None, count), field, f"has {count} entries: {rule}")
    require(not call.echo, field, "cannot be used with echo")


def _check_masks(call: GenerateCall, limits: GatewaySection) -> None:
    name, allowed = "allowed_token_ids", call.allowed_token_ids
    require(allowed is None or len(allowed) > 0, name, "must not be empty")
    _check_texts("bad_words", "word", call.bad_words, limits)


def _check_truncation(call: GenerateCall) -> None:
    name, wanted, side = "truncate_prompt_tokens", call.truncate_prompt_tokens, "truncation_side"
    fits = wanted is None or wanted == -1 or 1 <= wanted < 2**31
    require(fits, name, f"({wanted}) must be -1 or at least 1")
    given = call.truncation_side
    require(given in (None, "left", "right"), side, f"({str(given)[:32]!r}) must be left or right")
    require(wanted is None or call.embeds is None, name, "cannot be used with embeddings")


def check_chat(chat: ChatInput) -> None:
    """Raise ``RequestError`` for a conversation that cannot be rendered."""
    require(len(chat.messages) > 0, "messages", "must not be empty")
    both = chat.continue_final_message and chat.add_generation_prompt
    rule = "and add_generation_prompt cannot both be true"
    require(not both, "continue_final_message", rule)
    reserved = sorted(RESERVED_VARIABLES.intersection(chat.template_kwargs))
    require(not reserved, "chat_template_kwargs", f"must not set {', '.join(reserved)}")


def check_range(
    name: str, value: float | None, bounds: Range, limits: GatewaySection | None = None
) -> None:
    """Raise ``RequestError`` for a value out of range."""
    if value is None:
        return
    low, high = bounds.low, bounds.high
    most: float = getattr(limits, high) if isinstance(high, str) else high
    is_inside = (value > low if bounds.above else value >= low) and value <= most
    rule = f"{'above' if bounds.above else 'at least'} {low} and at most {most}"
    shown = str(value) if len(str(value)) <= 32 else f"{str(value)[:32]}..."
    require(is_inside, name, f"({shown}) must be {rule}")
