"""Sequence classification: the token whose hidden state is classified. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from workers.requests.request import Request


def pooled_position(token_ids: Sequence[int], pad_token_id: int | None) -> int:
    """Position of the token whose final hidden state is classified, in a non-empty prompt.

    It is the last token that is not the pad token, or 0 if all are. Without a pad token it is the
    last token. Example: for [5, 6, 0] it is 1 with pad token 0, and 2 without a pad token.
    """
    if pad_token_id is None:
        return len(token_ids) - 1
    return max((i for i, token in enumerate(token_ids) if token != pad_token_id), default=0)


def cut_after_pooled(request: Request, pad_token_id: int | None) -> Request:
    """The request without the tokens after ``pooled_position``, which have no effect."""
    end = pooled_position(request.prompt, pad_token_id) + 1
    return request if end == len(request.prompt) else replace(request, prompt=request.prompt[:end])
