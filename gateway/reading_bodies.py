"""What the bodies of calls that read prompts have in common."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from gateway.delta import Usage
from gateway.schema import STRICT, Items, Whole

PromptField = str | Items[int] | Items[str] | Items[Items[int]]
"""One prompt or several, as text or token ids."""


class ReadingBody(BaseModel):
    """Fields that all these bodies share."""

    model_config = STRICT
    model: str | None = None
    add_special_tokens: bool | None = None
    priority: Whole | None = None
    cache_salt: str | None = None


def mask_list(mask: list[int] | list[list[int]] | None) -> tuple[tuple[int, ...], ...]:
    """Masks by prompt; one list of numbers is that of one prompt."""
    if not mask:
        return ()
    if isinstance(mask[0], int):
        return (tuple(number for number in mask if isinstance(number, int)),)
    return tuple(tuple(one) for one in mask if isinstance(one, list))


def reading_usage(usage: Usage) -> dict[str, Any]:
    """The ``usage`` object of a call that draws nothing."""
    body: dict[str, Any] = {
        "prompt_tokens": usage.prompt_tokens,
        "total_tokens": usage.prompt_tokens,
    }
    if usage.cached_tokens is not None:
        body["prompt_tokens_details"] = {"cached_tokens": usage.cached_tokens}
    return body
