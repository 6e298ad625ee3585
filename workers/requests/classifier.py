"""Sequence classification: selects the token whose hidden state is classified. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from workers.requests.request import Request


def pooled_position(token_ids: Sequence[int], pad_token_id: int | None) -> int:
    """Return the position of the token whose final hidden state a sequence classifier reads.

    It is the position of the last token that is not the pad token, or 0 if all tokens are pad
    tokens. Without a pad token (None) it is the last position. The prompt must not be empty.
    Example: for [5, 6, 0] it is 1 with pad token 0, and 2 without a pad token.
    """
    if pad_token_id is None:
        return len(token_ids) - 1
    return max((i for i, token in enumerate(token_ids) if token != pad_token_id), default=0)


def cut_after_pooled(request: Request, pad_token_id: int | None) -> Request:
    """Return the request of a classification without the prompt tokens after ``pooled_position``.

    These tokens have no effect on the result.
    """
    end = pooled_position(request.prompt, pad_token_id) + 1
    return request if end == len(request.prompt) else replace(request, prompt=request.prompt[:end])
