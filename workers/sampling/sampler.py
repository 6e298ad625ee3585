"""Sampling of tokens from logits. A token depends only on a row's logits, parameters and history.

Penalties, bias and masks are first (``workers/sampling/logits_processors.py``), then temperature,
top_k, top_p, min_p and the draw (``workers/sampling/draws.py``). At temperature 0 the best token is
selected; of several best tokens, the one with the lowest id. A draw uses a few uniform random
numbers that depend only on (seed, choice, index of the token), not on the batch, restarts or the
machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum

import numpy as np
import torch
from msgspec import Struct
from msgspec.structs import replace
from torch import Tensor

from workers.model.host_copies import to_device, to_host
from workers.native.thread_team import ThreadTeam
from workers.requests.request import TokenLogprob
from workers.sampling.best_tokens import finite_rows
from workers.sampling.draws import NONE_ALLOWED, NOT_FINITE, draw
from workers.sampling.logits_processors import SamplingRow, apply_processors

Score = Callable[
    [Tensor, Sequence[int], Sequence[int], Sequence[Sequence[int]]], list[TokenLogprob]
]
"""Function that returns log-probabilities of tokens: ``logprob_entries`` or one with its
signature."""


class SamplingFailure(Enum):
    """Reason why no token could be sampled."""

    NOT_FINITE = "not_finite"
    NONE_ALLOWED = "none_allowed"


_FAILURES = {NOT_FINITE: SamplingFailure.NOT_FINITE, NONE_ALLOWED: SamplingFailure.NONE_ALLOWED}


class SampledToken(Struct, frozen=True):
    """Result of sampling a token from one row of logits."""

    token: int
    """Id of the sampled token; -1 after a failure."""
    logprob: TokenLogprob | None = None
    """Log-probabilities of the token and of alternatives; None if not requested."""
    failure: SamplingFailure | None = None
    """Reason why no token was sampled; None after success."""


def sample_tokens(
    logits: Tensor,
    rows: Sequence[SamplingRow],
    team: ThreadTeam | None = None,
    drawn: Tensor | None = None,
) -> Tensor:
    """Sample one token for each row of logits [rows, V]; returns [rows] int64.

    The result is ``NOT_FINITE`` for a row with NaN or infinity, and ``NONE_ALLOWED`` if all tokens
    of a row are masked. ``team``: threads for the native kernel; None: torch. drawn [rows] int64:
    tokens that were already sampled from the unprocessed logits; None: none were.
    """
    changed = [i for i, row in enumerate(rows) if not row.is_plain]
    if not changed:
        return draw(logits, rows, team=team) if drawn is None else drawn
    part, part_rows = select_rows(logits, changed), [rows[i] for i in changed]
    processed = draw(apply_processors(part, part_rows), part_rows, is_masked=True, team=team)
    processed = torch.where(finite_rows(part), processed, NOT_FINITE)
    plain = [i for i, row in enumerate(rows) if row.is_plain]
    if not plain:
        return processed
    if drawn is None:
        others = draw(select_rows(logits, plain), [rows[i] for i in plain], team=team)
    else:
        others = select_rows(drawn, plain)
    order = np.argsort([*changed, *plain])
    return torch.cat([processed, others])[to_device(order, logits.device)]


def sampled_tokens(
    logits: Tensor | None, rows: Sequence[SamplingRow], tokens: Sequence[int], score: Score
) -> list[SampledToken]:
    """Convert the values that ``sample_tokens`` returned to results, with log-probabilities if
    requested.

    ``logits``: None if no row requests log-probabilities. ``score`` computes them.
    """
    entries = _entries(logits, rows, tokens, score)
    return [
        SampledToken(token, entries.get(i))
        if token >= 0
        else SampledToken(-1, failure=_FAILURES[token])
        for i, token in enumerate(tokens)
    ]


def select_rows(x: Tensor, rows: Sequence[int]) -> Tensor:
    """Return the given rows of x [T, ..]; x itself if these are all rows in order."""
    return x if rows == list(range(len(x))) else x[to_device(rows, x.device)]


def all_finite(logits: Tensor) -> bool:
    """Whether logits [rows, V] have neither NaN nor infinity."""
    return bool(finite_rows(logits).all())  # device-to-host sync


def _entries(
    logits: Tensor | None, rows: Sequence[SamplingRow], tokens: Sequence[int], score: Score
) -> dict[int, TokenLogprob]:
    """Return the log-probabilities of sampled tokens, by row index, for rows that request them, are
    not of a beam search, and have a token."""
    requested = [
        i
        for i, row in enumerate(rows)
        if row.params.logprobs is not None and row.params.beams is None and tokens[i] >= 0
    ]
    if not requested:
        return {}
    assert logits is not None, "rows request log-probabilities"
    params = [rows[i].params for i in requested]
    entries = score(
        select_rows(logits, requested),
        [tokens[i] for i in requested],
        [p.logprobs or 0 for p in params],
        [p.logprob_token_ids for p in params],
    )
    return dict(zip(requested, entries, strict=True))


def logprob_entries(
    logits: Tensor,
    tokens: Sequence[int],
    num_top: Sequence[int],
    named: Sequence[Sequence[int]] | None = None,
) -> list[TokenLogprob]:
    """Return log-probabilities of ``tokens`` [rows] by unprocessed logits [rows, V], with
    alternatives.

    The alternatives of a row are its ``num_top`` best tokens, or its ``named`` tokens in their
    order.
    """
    logits = logits.float()
    normalizer = logits.logsumexp(-1, keepdim=True)
    places = to_device(tokens, logits.device).unsqueeze(1)
    chosen = logits.gather(1, places)
    ranks = (logits > chosen).sum(-1) + 1
    best = logits.topk(min(max(num_top), logits.shape[1]), -1)
    requested = {i: ids for i, ids in enumerate(named or ()) if ids}
    others = [
        logits[i, to_device(ids, logits.device)] - normalizer[i] for i, ids in requested.items()
    ]
    fetched = [(chosen - normalizer).squeeze(1), ranks, best.indices, best.values - normalizer]
    own, rank_list, top_ids, top_logprobs, *named_logprobs = (
        values.tolist()
        for values in to_host([*fetched, *others])  # device-to-host sync
    )
    entries = [
        TokenLogprob(
            token_id=token,
            logprob=own[i],
            rank=rank_list[i],
            top_ids=tuple(top_ids[i][:count]),
            top_logprobs=tuple(top_logprobs[i][:count]),
        )
        for i, (token, count) in enumerate(zip(tokens, num_top, strict=True))
    ]
    for (i, ids), values in zip(requested.items(), named_logprobs, strict=True):
        entries[i] = replace(entries[i], top_ids=tuple(ids), top_logprobs=tuple(values))
    return entries


def logprob_entries_by_row(
    logits: Tensor,
    tokens: Sequence[int],
    num_top: Sequence[int],
    named: Sequence[Sequence[int]] | None = None,
) -> list[TokenLogprob]:
    """Return the results of ``logprob_entries``, computed with a separate tensor for each row.

    Some torch functions use another formula for the last elements of a tensor. So the results of a
    row are independent of the batch only if the row has a tensor of its own.
    """
    named = named or [()] * len(tokens)
    return [
        logprob_entries(values.clone().unsqueeze(0), [token], [count], [ids])[0]
        for values, token, count, ids in zip(logits, tokens, num_top, named, strict=True)
    ]
