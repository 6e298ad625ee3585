"""From logits to tokens. Pure: what is drawn depends on a row's logits, parameters and history.

Penalties, bias and masks come first (``workers/sampling/logits_processors.py``); then temperature,
top_k, top_p, min_p. At temperature 0 the best token is taken, ties to the lowest id. Randomness is
a few uniform numbers that are a function of (seed, choice, index of the token) alone: the batch,
restarts and other machines do not change it. All limits keep tokens that tie with the last one
kept, so that no sorting order matters.

Logits of a row that is served alone and in a batch differ by rounding, and a token is drawn at the
edge of its interval now and then. One number for the whole cumulative distribution meets an edge of
any of V tokens: at a rounding of 2e-6 that changed 1 of 8000 tokens (V = 1024) or 1 of 400
(V = 50304). A walk down a tree of 16 branches a node, with a number for each level, meets 15 edges
a level: 1 of 400000.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from enum import Enum

import numpy as np
import torch
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray
from torch import Tensor

from workers.requests.request import SamplingParams, TokenLogprob
from workers.sampling.best_tokens import best_of_finite, best_tokens, finite_rows
from workers.sampling.logits_processors import SamplingRow, apply_processors

_MASK64 = (1 << 64) - 1
_BRANCHES = 16
"""Branches of a node in the walk that draws a token."""
_FIRST_CANDIDATES = 256
"""Best tokens looked at for top_p before all are sorted."""


class DrawFailure(Enum):
    """Why no token could be drawn."""

    NOT_FINITE = "not_finite"
    NONE_ALLOWED = "none_allowed"


_NOT_FINITE, _NONE_ALLOWED = -1, -2
_FAILURES = {_NOT_FINITE: DrawFailure.NOT_FINITE, _NONE_ALLOWED: DrawFailure.NONE_ALLOWED}


class Drawn(Struct, frozen=True):
    """The result of one row."""

    token: int
    """The token; -1 after a failure."""
    logprob: TokenLogprob | None = None
    """Where asked for."""
    failure: DrawFailure | None = None
    """NaN or infinity in the logits, or every token is masked; None for a token."""


_NO_TOKEN = Drawn(-1, failure=DrawFailure.NOT_FINITE)


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> list[Drawn]:
    """Draw one token per row of logits [rows, V] (model dtype)."""
    best = [i for i, row in enumerate(rows) if row.takes_best]
    if len(best) == len(rows):
        return _take_best(logits)
    if not best:
        return _sample_others(logits, rows)
    others = [i for i, row in enumerate(rows) if not row.takes_best]
    found = dict(zip(best, _take_best(logits[best]), strict=True))
    drawn = _sample_others(logits[others], [rows[i] for i in others])
    found.update(zip(others, drawn, strict=True))
    return [found[i] for i in range(len(rows))]


def _take_best(logits: Tensor) -> list[Drawn]:
    """The rows that ask for the best token of the logits as they are."""
    tokens: list[int] = best_of_finite(logits).tolist()  # device-to-host sync
    return [Drawn(token) if token >= 0 else _NO_TOKEN for token in tokens]


def _sample_others(logits: Tensor, rows: Sequence[SamplingRow]) -> list[Drawn]:
    """The rows that ask for more: rules, randomness or logprobs."""
    finite = finite_rows(logits)
    processed = apply_processors(logits, rows)
    tokens = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
    greedy = [i for i, row in enumerate(rows) if row.is_greedy]
    random = [i for i, row in enumerate(rows) if not row.is_greedy]
    if greedy:
        tokens[greedy] = _best_allowed(_some(processed, greedy))
    if random:
        part = _some(processed, random)
        drawn = draw(part.float(), [rows[i] for i in random])
        if processed is not logits:
            drawn = torch.where(torch.isfinite(part.amax(-1)), drawn, _NONE_ALLOWED)
        tokens[random] = drawn
    tokens = torch.where(finite, tokens, _NOT_FINITE)
    ids: list[int] = tokens.tolist()  # device-to-host sync
    entries = _entries(logits, rows, ids)
    return [
        Drawn(max(token, -1), entries.get(i), _FAILURES.get(token)) for i, token in enumerate(ids)
    ]


def _best_allowed(logits: Tensor) -> Tensor:
    """[rows]: the best token of logits [rows, V] after masks."""
    best = best_tokens(logits)
    values = logits.gather(1, best.unsqueeze(1)).squeeze(1)
    return torch.where(torch.isfinite(values), best, _NONE_ALLOWED)


def _some(logits: Tensor, rows: Sequence[int]) -> Tensor:
    """These rows of logits [rows, V]; no copy of all of them."""
    return logits if len(rows) == len(logits) else logits[rows]


def all_finite(logits: Tensor) -> bool:
    """Whether there is no NaN or infinity in logits [rows, V]."""
    return bool(finite_rows(logits).all())  # device-to-host sync


def _entries(
    logits: Tensor, rows: Sequence[SamplingRow], tokens: Sequence[int]
) -> dict[int, TokenLogprob]:
    """Logprobs of the drawn tokens by row, where asked for."""
    asked = [i for i, r in enumerate(rows) if r.params.logprobs is not None and tokens[i] >= 0]
    if not asked:
        return {}
    params = [rows[i].params for i in asked]
    entries = logprob_entries(
        logits[asked],
        [tokens[i] for i in asked],
        [p.logprobs or 0 for p in params],
        [p.logprob_token_ids for p in params],
    )
    return dict(zip(asked, entries, strict=True))


def draw(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Tokens [rows] int64 drawn from float32 logits [rows, V] at temperatures above 0.

    -1 where the weights of the tokens have no finite sum.
    """
    device = logits.device

    def column(values: Iterable[float]) -> Tensor:
        return torch.tensor(list(values), device=device).unsqueeze(1)

    scaled = logits / column(row.params.temperature for row in rows)
    scaled -= scaled.amax(-1, keepdim=True)
    floor = _floors(scaled, rows, column)
    is_dropped = None if floor is None else scaled < floor
    weights = scaled.exp_()
    if is_dropped is not None:
        weights.masked_fill_(is_dropped, 0.0)
    cumulative = weights.double().cumsum_(-1)
    is_finite = torch.isfinite(cumulative[:, -1])
    return torch.where(is_finite, _descend(cumulative, rows), _NOT_FINITE)


def _descend(cumulative: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Tokens [rows] under unnormalised cumulative distributions [rows, V] float64.

    Each level splits the interval of tokens that is left into 16 and picks one by its weight.
    """
    device, vocab_size = cumulative.device, cumulative.shape[1]
    num_levels = 1
    while _BRANCHES**num_levels < vocab_size:
        num_levels += 1
    randomness = [(row.params.seed, row.choice, row.index) for row in rows]
    numbers = torch.from_numpy(uniforms(randomness, num_levels)).to(device)
    first = torch.zeros(len(rows), 1, dtype=torch.int64, device=device)
    for level in range(num_levels):
        width = _BRANCHES ** (num_levels - 1 - level)
        edges = first + width * torch.arange(_BRANCHES + 1, device=device)
        edges = edges.clamp_(max=vocab_size)
        below = cumulative.gather(1, (edges - 1).clamp_(min=0)).masked_fill_(edges == 0, 0.0)
        low, high = below[:, :1], below[:, -1:]
        target = low + numbers[:, level : level + 1] * (high - low)
        target = torch.minimum(target, torch.nextafter(high, low))  # rounding must not reach high
        branch = torch.searchsorted(below[:, 1:].contiguous(), target, right=True)
        first = edges.gather(1, branch)
    return first.squeeze(1)


def _floors(
    scaled: Tensor, rows: Sequence[SamplingRow], column: Callable[[Iterable[float]], Tensor]
) -> Tensor | None:
    """[rows, 1]: tokens below this scaled logit (best is 0) are dropped; None: no row drops any."""
    params = [row.params for row in rows]
    limited = [i for i, p in enumerate(params) if p.top_k > 0 or p.top_p < 1]
    if not limited and not any(p.min_p for p in params):
        return None
    floor = column(p.min_p for p in params).log()  # minus infinity for 0
    if limited:
        part = scaled if len(limited) == len(rows) else scaled[limited]
        cut = _truncations(part, [params[i] for i in limited])
        floor[limited] = torch.maximum(floor[limited], cut)
    return floor


def _truncations(scaled: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """[rows, 1]: the lowest scaled logit that top_k, then top_p keep."""
    device, vocab_size = scaled.device, scaled.shape[1]
    top_k = [p.top_k if 0 < p.top_k < vocab_size else 0 for p in params]  # 0: no limit
    ks = torch.tensor(top_k, device=device).unsqueeze(1)
    top_p = torch.tensor([p.top_p for p in params], dtype=torch.float64, device=device).unsqueeze(1)
    is_off = top_p >= 1
    width = min(vocab_size, max(_FIRST_CANDIDATES, *top_k))
    while True:
        best = scaled.topk(width, -1).values
        kth = best.gather(1, (ks - 1).clamp(min=0))
        by_k = torch.where(ks > 0, kth, float("-inf"))
        mass = scaled.exp().masked_fill_(scaled < by_k, 0.0).sum(-1, True, dtype=torch.float64)
        enough = best.exp().cumsum(-1, dtype=torch.float64) / mass >= top_p
        reached = enough.any(-1, True)
        is_last = width == vocab_size
        if bool((reached | is_off | is_last).all()):  # device-to-host sync
            break
        width = min(vocab_size, width * 16)
    last = enough.long().argmax(-1, keepdim=True)
    by_p = torch.where(reached & ~is_off, best.gather(1, last), float("-inf"))
    return torch.maximum(by_k, by_p)


def uniforms(rows: Sequence[tuple[int, int, int]], num_levels: int) -> NDArray[np.float64]:
    """[rows, num_levels] numbers in [0, 1) for each (seed, choice, index): always the same ones.

    Source: splitmix64 (Steele, Lea and Flood 2014), chained over the three values and the level.
    """
    values = np.array([[n & _MASK64 for n in row] for row in rows], dtype=np.uint64)
    state = _splitmix64(values[:, :1])
    for column in (values[:, 1:2], values[:, 2:], np.arange(num_levels, dtype=np.uint64)):
        state = _splitmix64(state ^ column)
    found: NDArray[np.float64] = (state >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return found


def _splitmix64(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Modulo 2 ** 64, as numpy computes."""
    z = state + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def logprob_entries(
    logits: Tensor,
    tokens: Sequence[int],
    num_top: Sequence[int],
    named: Sequence[Sequence[int]] | None = None,
) -> list[TokenLogprob]:
    """Logprobs of given tokens [rows] under raw logits [rows, V], with rank and the best few.

    A row that has ``named`` tokens reports those, in their order, in place of the best.
    """
    logits = logits.float()
    normalizer = logits.logsumexp(-1, keepdim=True)
    places = torch.tensor(list(tokens), device=logits.device).unsqueeze(1)
    chosen = logits.gather(1, places)
    ranks = (logits > chosen).sum(-1) + 1
    best = logits.topk(min(max(num_top), logits.shape[1]), -1)
    own = (chosen - normalizer).squeeze(1).tolist()  # device-to-host sync
    top_logprobs = (best.values - normalizer).tolist()
    top_ids, rank_list = best.indices.tolist(), ranks.tolist()
    entries = [
        TokenLogprob(
            token_id=token,
            logprob=own[i],
            rank=rank_list[i],
            top=tuple(zip(top_ids[i], top_logprobs[i], strict=True))[:count],
        )
        for i, (token, count) in enumerate(zip(tokens, num_top, strict=True))
    ]
    for i, ids in enumerate(named or ()):
        if ids:
            values = logits[i, torch.tensor(ids, device=logits.device)] - normalizer[i]
            entries[i] = replace(entries[i], top=tuple(zip(ids, values.tolist(), strict=True)))
    return entries


def sample_alone(logits: Tensor, rows: Sequence[SamplingRow]) -> list[Drawn]:
    """``sample`` with each row in memory of its own, for ``--deterministic``.

    Some functions of torch compute the last elements of a tensor with another formula than the
    others, so a row must not share its tensor with other rows.
    """
    best = [i for i, row in enumerate(rows) if row.takes_best]  # comparisons are exact anywhere
    found = dict(zip(best, _take_best(_some(logits, best)), strict=True)) if best else {}
    return [
        found[i] if i in found else sample(values.clone().unsqueeze(0), [row])[0]
        for i, (values, row) in enumerate(zip(logits, rows, strict=True))
    ]


def logprob_entries_alone(
    logits: Tensor, tokens: Sequence[int], num_top: Sequence[int]
) -> list[TokenLogprob]:
    """``logprob_entries`` with each row in memory of its own; see ``sample_alone``."""
    return [
        logprob_entries(values.clone().unsqueeze(0), [token], [count])[0]
        for values, token, count in zip(logits, tokens, num_top, strict=True)
    ]
