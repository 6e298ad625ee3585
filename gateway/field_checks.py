"""What the fields of a call may be, each by itself and together: all that needs no model."""

from __future__ import annotations

from typing import Any

from cluster.errors import RequestError, UnsupportedParameterError
from cluster.gateway_config import GatewaySection
from gateway.call import CallKind, ChatInput, GenerateFields
from gateway.chat_template import RESERVED_VARIABLES

MAX_LOGIT_BIAS_ENTRIES = 1024
"""Entries of ``logit_bias``."""
MAX_STOP_TOKEN_IDS = 1024
"""Entries of ``stop_token_ids``."""
MAX_CACHE_SALT_CHARS = 256
"""Length of ``cache_salt``."""
MAX_BAD_WORDS = 1024
"""Entries of ``bad_words``."""
MAX_LOGPROB_TOKEN_IDS = 128
"""Entries of ``logprob_token_ids``."""
MAX_MESSAGES = 16_384
"""Messages of a conversation."""
MAX_PARTS = 65_536
"""Fields, content parts and calls of all messages together."""
_CONTAINERS = (dict, list)
_INT32 = 2**31
_INT64 = 2**63


def check_fields(fields: GenerateFields, limits: GatewaySection) -> None:
    """Check all that does not depend on the model.

    Raises:
        RequestError: names the field, its value and the limit.
    """
    _check_counts(fields, limits)
    _check_sampling(fields)
    _check_stops(fields, limits)
    check_range("priority", fields.priority, -_INT32, _INT32 - 1)
    check_cache_salt(fields.cache_salt)
    _check_logprobs(fields, limits)
    _check_masks(fields, limits)
    _check_truncation(fields)
    if fields.chat is not None:
        check_chat(fields.chat)


def require(ok: bool, name: str, message: str) -> None:
    """Raise ``RequestError`` about the field ``name`` unless ``ok``."""
    if not ok:
        raise RequestError(message, name)


def check_length(name: str, count: int, most: int) -> None:
    """Raise ``RequestError`` for a list of more than ``most`` entries."""
    require(count <= most, name, f"{name} has {count} entries, at most {most} are allowed")


def check_messages(count: int, num_parts: int) -> None:
    """Raise ``RequestError`` for too many messages, or parts (see ``MAX_PARTS``) of them."""
    check_length("messages", count, MAX_MESSAGES)
    message = f"messages have {num_parts} fields, parts and calls, at most {MAX_PARTS} are allowed"
    require(num_parts <= MAX_PARTS, "messages", message)


def given_one(**values: object) -> str:
    """Name of the one field of several that is set.

    Raises:
        RequestError: none is set, or more than one.
    """
    names, all_names = [name for name in values if values[name] is not None], " and ".join(values)
    if not names:
        message = f"one of {all_names} is required"
        raise RequestError(message, next(iter(values)), "missing_required_parameter")
    require(len(names) == 1, names[0], f"{all_names} cannot be set together")
    return names[0]


def _check_counts(fields: GenerateFields, limits: GatewaySection) -> None:
    check_range("n", fields.n, 1, limits.max_n)
    _check_best_of(fields, limits)
    name, wanted = fields.max_tokens_name, fields.max_tokens
    if wanted is not None:
        least = 0 if fields.echo else 1
        note = "" if fields.echo or wanted else " (0 needs echo)"
        require(wanted >= least, name, f"{name} ({wanted}) must be at least {least}{note}")
    if fields.min_tokens is not None:
        least_new = fields.min_tokens
        require(least_new >= 0, "min_tokens", f"min_tokens ({least_new}) must not be negative")
        if wanted is not None:
            require(
                least_new <= wanted,
                "min_tokens",
                f"min_tokens ({least_new}) must not exceed {name} ({wanted})",
            )
    if fields.kind is CallKind.COMPLETION:
        _check_prompts(fields, limits)


def _check_best_of(fields: GenerateFields, limits: GatewaySection) -> None:
    drawn, told = fields.best_of, fields.n or 1
    check_range("best_of", drawn, 1, limits.max_n)
    if drawn is None or drawn == told:
        return
    if fields.kind is CallKind.CHAT:
        raise UnsupportedParameterError("best_of is not supported", "best_of")
    require(drawn > told, "best_of", f"best_of ({drawn}) must be at least n ({told})")


def check_stream(fields: GenerateFields) -> None:
    """Raise ``RequestError`` for what can be told at the end only."""
    is_ranked = fields.kind is CallKind.COMPLETION and (fields.best_of or 0) > (fields.n or 1)
    require(not is_ranked, "best_of", "best_of cannot go with a stream")


def _check_prompts(fields: GenerateFields, limits: GatewaySection) -> None:
    count, most = len(fields.prompts), min(limits.max_batch_prompts, limits.max_queue)
    field = fields.prompt_name
    require(count > 0, field, f"{field} must not be empty")
    check_length(field, count, most)
    name = "n" if fields.best_of is None else "best_of"
    choices = count * (fields.best_of or fields.n or 1)
    require(
        choices <= limits.max_choices,
        name,
        f"prompts times {name} ({choices}) must be at most {limits.max_choices}",
    )
    for prompt in fields.prompts:
        require(len(prompt) > 0, field, f"{field} must not be empty")


def _check_sampling(fields: GenerateFields) -> None:
    check_range("temperature", fields.temperature, 0, 100)
    check_range("top_p", fields.top_p, 0, 1, above=True)
    check_range("min_p", fields.min_p, 0, 1)
    check_range("top_k", fields.top_k, -1, _INT64 - 1)
    check_range("frequency_penalty", fields.frequency_penalty, -2, 2)
    check_range("presence_penalty", fields.presence_penalty, -2, 2)
    check_range("repetition_penalty", fields.repetition_penalty, 0, 2, above=True)
    check_range("seed", fields.seed, -_INT64, _INT64 - 1)
    check_length("logit_bias", len(fields.logit_bias), MAX_LOGIT_BIAS_ENTRIES)
    for _, bias in fields.logit_bias:
        check_range("logit_bias", bias, -100, 100)


def _check_stops(fields: GenerateFields, limits: GatewaySection) -> None:
    count, most = len(fields.stop), limits.max_stop_strings
    require(count <= most, "stop", f"stop has {count} strings, at most {most} are allowed")
    for stop in fields.stop:
        require(len(stop) > 0, "stop", "stop must not contain an empty string")
        require(
            len(stop) <= limits.max_stop_chars,
            "stop",
            f"stop has a string of {len(stop)} characters, at most {limits.max_stop_chars} "
            "are allowed",
        )
    require(
        not (fields.stop and fields.token_ids_only), "stop", "stop cannot go with token_ids_only"
    )
    check_length("stop_token_ids", len(fields.stop_token_ids), MAX_STOP_TOKEN_IDS)


def check_cache_salt(salt: str | None) -> None:
    """Raise ``RequestError`` for one that is empty or too long."""
    if salt is None:
        return
    require(len(salt) > 0, "cache_salt", "cache_salt must not be empty")
    require(
        len(salt) <= MAX_CACHE_SALT_CHARS,
        "cache_salt",
        f"cache_salt has {len(salt)} characters, at most {MAX_CACHE_SALT_CHARS} are allowed",
    )


def _check_logprobs(fields: GenerateFields, limits: GatewaySection) -> None:
    name, wanted = fields.logprobs_name, fields.logprobs
    check_range("prompt_logprobs", fields.prompt_logprobs, 0, limits.max_logprobs)
    count, most = len(fields.logprob_token_ids), MAX_LOGPROB_TOKEN_IDS
    if not count:
        check_range(name, wanted, 0, limits.max_logprobs)
        return
    field = "logprob_token_ids"
    check_length(field, count, most)
    require(
        len(set(fields.logprob_token_ids)) == count, field, f"{field} must not name a token twice"
    )
    require(
        wanted in (None, count),
        field,
        f"{field} has {count} entries: {name} ({wanted}) must be the same or unset",
    )
    require(not fields.echo, field, f"{field} cannot go with echo")


def _check_masks(fields: GenerateFields, limits: GatewaySection) -> None:
    require(
        fields.allowed_token_ids is None or len(fields.allowed_token_ids) > 0,
        "allowed_token_ids",
        "allowed_token_ids must not be empty",
    )
    count, longest = len(fields.bad_words), limits.max_stop_chars
    check_length("bad_words", count, MAX_BAD_WORDS)
    for word in fields.bad_words:
        require(len(word) > 0, "bad_words", "bad_words must not contain an empty word")
        require(
            len(word) <= longest,
            "bad_words",
            f"bad_words has a word of {len(word)} characters, at most {longest} are allowed",
        )


def _check_truncation(fields: GenerateFields) -> None:
    name, wanted, side = "truncate_prompt_tokens", fields.truncate_prompt_tokens, "truncation_side"
    require(
        wanted is None or wanted == -1 or 1 <= wanted < _INT32,
        name,
        f"{name} ({wanted}) must be -1 or at least 1",
    )
    given = fields.truncation_side
    require(
        given in (None, "left", "right"),
        side,
        f"{side} ({str(given)[:32]!r}) must be left or right",
    )
    require(wanted is None or fields.embeds is None, name, f"{name} cannot go with embeddings")


def check_chat(chat: ChatInput) -> None:
    """Raise ``RequestError`` for a conversation that cannot be rendered."""
    require(len(chat.messages) > 0, "messages", "messages must not be empty")
    require(
        not (chat.continue_final_message and chat.add_generation_prompt),
        "continue_final_message",
        "continue_final_message and add_generation_prompt cannot both be true",
    )
    reserved = sorted(RESERVED_VARIABLES.intersection(chat.template_kwargs))
    require(
        not reserved,
        "chat_template_kwargs",
        f"chat_template_kwargs must not set {', '.join(reserved)}",
    )


def check_range(
    name: str, value: float | None, low: float, high: float, above: bool = False
) -> None:
    """Raise ``RequestError`` unless ``low <= value <= high``, or ``low < value`` with ``above``.

    None always fits, NaN never.
    """
    if value is None:
        return
    is_inside = (value > low if above else value >= low) and value <= high
    bounds = f"{'above' if above else 'at least'} {low} and at most {high}"
    shown = str(value) if len(str(value)) <= 32 else f"{str(value)[:32]}..."
    require(is_inside, name, f"{name} ({shown}) must be {bounds}")


def is_deeper(data: object, max_depth: int) -> bool:
    """Whether objects and arrays are nested in each other more than ``max_depth`` deep."""
    level: list[Any] = [data]
    for _ in range(max_depth):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, _CONTAINERS)
        ]
        if not level:
            return False
    return True
