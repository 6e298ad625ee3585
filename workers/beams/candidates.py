"""Selects the candidate next tokens of beams from logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from torch import Tensor

from workers.model.host_copies import to_device, to_host
from workers.requests.request import TokenLogprob

_MASKED = float("-inf")


@dataclass(frozen=True, kw_only=True, slots=True)
class CandidateParams:
    """Parameters that select the candidate next tokens of one request's beams in a step."""

    width: int
    """Number of beams of the request."""
    ending: tuple[int, ...]
    """Ids of tokens that end the text: stop tokens and end-of-sequence tokens."""
    may_end: bool
    """Whether the text has its minimum length, so that it may end."""
    num_top: int | None = None
    """Number of most probable tokens to report with each candidate; None: no logprobs are
    reported."""


def beam_candidates(logits: Tensor, params: CandidateParams) -> list[list[TokenLogprob]]:
    """Return the candidate next tokens for each row of logits [rows, V], the most probable first.

    The candidates are the ``width`` most probable tokens that do not end the text and, with
    ``may_end``, the ``width`` most probable of all tokens.
    """
    logits = logits.float()
    normalizer = logits.logsumexp(-1, keepdim=True)
    num_best = max(params.width, params.num_top or 0)
    ending = to_device(params.ending, logits.device)
    masked = logits.index_fill(1, ending, _MASKED) if params.ending else logits
    best = logits.topk(min(num_best, logits.shape[1]), -1)
    others = masked.topk(min(params.width, logits.shape[1] - len(params.ending)), -1)
    ends = logits[:, ending] if params.ending else logits[:, :0]
    fetched = [best.indices, best.values - normalizer, others.indices, others.values - normalizer]
    rows = (v.tolist() for v in to_host([*fetched, ends - normalizer]))  # device-to-host sync
    return [_row(params, *row) for row in zip(*rows, strict=True)]


def beam_candidates_by_row(logits: Tensor, params: CandidateParams) -> list[list[TokenLogprob]]:
    """Return the result of ``beam_candidates``, computed row by row.

    A row's bits are then independent of the other rows; see ``logprob_entries_by_row``.
    """
    each = (beam_candidates(row.clone().unsqueeze(0), params) for row in logits)
    return list(chain.from_iterable(each))


def _row(
    params: CandidateParams,
    best_ids: Sequence[int],
    best: Sequence[float],
    other_ids: Sequence[int],
    others: Sequence[float],
    ends: Sequence[float],
) -> list[TokenLogprob]:
    top = tuple(zip(best_ids, best, strict=True))
    open_ones = dict(zip(other_ids, others, strict=True))
    logprobs = dict(top[: params.width] if params.may_end else ()) | open_ones
    ranked = sorted(logprobs.items(), key=lambda pair: (-pair[1], pair[0]))
    if params.num_top is None:
        return [TokenLogprob(token_id=token, logprob=value) for token, value in ranked]
    greater = (*others, *ends)  # contains all tokens that are more probable than one of ``found``
    return [
        TokenLogprob(
            token_id=token,
            logprob=value,
            rank=1 + sum(other > value for other in greater),
            top_ids=tuple(best_ids[: params.num_top]),
            top_logprobs=tuple(best[: params.num_top]),
        )
        for token, value in ranked
    ]
