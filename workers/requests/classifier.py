"""Sequence classification: the token whose hidden state is classified. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from workers.requests.request import Request


def pooled_position(token_ids: Sequence[int], pad_token_id: int | None) -> int:
    """Position whose final hidden state is classified, in a non-empty prompt.

    It is the last token that is not the pad token, even between pad tokens; 0 if all are pad
    tokens. A model without a pad token uses the last one: [5, 6, 0] -> 1 with pad token 0, else 2.
    """
    if pad_token_id is None:
        return len(token_ids) - 1
    return max((i for i, token in enumerate(token_ids) if token != pad_token_id), default=0)


def cut_after_pooled(request: Request, pad_token_id: int | None) -> Request:
    """The request cut after that token: later tokens have no effect and are not computed."""
    end = pooled_position(request.prompt, pad_token_id) + 1
    return request if end == len(request.prompt) else replace(request, prompt=request.prompt[:end])
