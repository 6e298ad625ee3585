"""Samples a token from each row of logits, by a kernel or by torch, the reference of the kernels.

The weight of a token is 2 ** t for t = (logit - best logit) * log2(e) / temperature, as an integer
in units of 2 ** -40. Integers have the same sum in any order, and all other operations are
elementwise and defined by IEEE 754 to the last bit. So a row's token depends neither on its batch
nor on the number of threads, nor on whether a kernel (``workers/native/c/draw.c``,
``workers/cuda/draw.py``) or torch on any device samples it. Tokens with less than 2 ** -41 (5e-13)
of the best token's weight are never sampled.

top_k, top_p and min_p drop the tokens whose t is below a floor, so ties with the last one are kept.

Logits of a row alone and in a batch may differ by rounding. That changes the sampled token if the
random number is at an edge between the intervals of two tokens. With one number for the cumulative
distribution, the edges of all V tokens matter: with rounding errors of 2e-6, 1 of 8000 tokens (V =
1024) or 1 of 400 (V = 50304) changed. So the draw walks down a tree with 16 branches per node and
one number per level, which has 15 edges per level: 1 of 400000 changed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.model.host_copies import to_device
from workers.native.draws import DRAW_ROW, NUM_DRAW_INTEGERS, can_draw, draw_rows
from workers.native.thread_team import ThreadTeam
from workers.sampling.best_tokens import best_of_finite, best_tokens
from workers.sampling.logits_processors import SamplingRow

NOT_FINITE, NONE_ALLOWED = -1, -2
"""Values returned instead of a token: the logits have NaN or infinity, or all tokens are masked."""
_MASK64 = (1 << 64) - 1
_BRANCHES = 16
"""Number of branches of each node in the tree of tokens that a draw walks down."""
_FIRST_CANDIDATES = 256
"""Number of best tokens that top_p sorts first; more are sorted only if these are too few."""
_LOG2_E = math.log2(math.e)
_MIN_SCALE = float(np.finfo(np.float32).tiny)
"""Smallest factor log2(e) / temperature, used for the highest temperatures; a factor of 0 would
turn a masked logit (minus infinity) into NaN."""
_WEIGHT_BITS = 40
_COEFFICIENTS = (
    0.0013264723820611835,
    0.009671512991189957,
    0.05550733581185341,
    0.24022242426872253,
    0.6931470036506653,
    1.0,
)
"""Coefficients of a polynomial for 2 ** x with x in [-0.5, 0.5], highest power first; see
``c/weights.h``."""
_CACHED_LOGITS = 1 << 18
"""Number of logits that a CPU processes at a time, so that logits and weights stay in cache."""


def draw(
    logits: Tensor,
    rows: Sequence[SamplingRow],
    is_masked: bool = False,
    team: ThreadTeam | None = None,
) -> Tensor:
    """Sample a token from each row of logits [rows, V]; returns [rows] int64.

    The result is ``NOT_FINITE`` for a row with NaN or infinity, and ``NONE_ALLOWED`` if all tokens
    of a row are masked. ``is_masked``: tokens with a logit of minus infinity must not be
    sampled; all other logits are finite. The native kernel is used if there is a ``team`` and the
    kernel supports the dtype; a GPU always has a kernel.
    """
    how = draw_params(rows)
    if logits.device.type == "cuda":
        from workers.cuda import draw as cuda_draw  # late: needs Triton

        params = to_device(as_integers(how), logits.device)
        return cuda_draw.draw_rows(logits, params, is_masked)
    if team is not None and can_draw(logits):
        return draw_rows(team, logits, how, is_masked)
    best = _best_allowed(logits) if is_masked else best_of_finite(logits)
    drawn = np.flatnonzero(how["scale"])
    if not len(drawn):
        return best
    size = max(1, _CACHED_LOGITS // logits.shape[1]) if logits.is_cpu else len(logits)
    tokens = best.clone()
    for first in range(0, len(drawn), size):
        part = drawn[first : first + size]
        row_indices = to_device(part, logits.device)
        largest = best[row_indices].clamp(min=0).unsqueeze(1)  # arbitrary for a failed row
        values = logits[row_indices]
        tokens[row_indices] = _draw(values.float() - values.gather(1, largest).float(), how[part])
    return torch.where(best < 0, best, tokens)


def draw_params(rows: Sequence[SamplingRow]) -> NDArray[Any]:
    """Return the sampling parameters of rows in the kernels' layout: [rows] ``DRAW_ROW``."""
    values = [(r.params.seed & _MASK64, r.choice, r.index, *_limits(r)) for r in rows]
    return np.array(values, dtype=DRAW_ROW)


def as_integers(params: NDArray[Any]) -> NDArray[np.int64]:
    """View parameters of dtype ``DRAW_ROW`` [rows] as integers, [rows, 6] int64."""
    return params.view(np.int64).reshape(len(params), NUM_DRAW_INTEGERS)


def _limits(row: SamplingRow) -> tuple[float, float, float, int]:
    """Return top_p, scale (log2(e) / temperature), floor (log2 of min_p) and top_k of a row."""
    params = row.params
    if row.is_greedy:
        return 1.0, 0.0, 0.0, 0
    floor = math.log2(params.min_p) if params.min_p else -math.inf
    return params.top_p, max(_LOG2_E / params.temperature, _MIN_SCALE), floor, params.top_k


def _best_allowed(logits: Tensor) -> Tensor:
    """Return the best token of each row of masked logits [rows, V], or ``NONE_ALLOWED``: [rows]."""
    best = best_tokens(logits)
    values = logits.gather(1, best.unsqueeze(1)).squeeze(1)
    return torch.where(torch.isfinite(values), best, NONE_ALLOWED)


def _draw(below: Tensor, how: NDArray[Any]) -> Tensor:
    """Sample a token for each row: [rows]. ``below`` [rows, V] float32: logits minus the row's best
    logit."""
    numbers = _draw_params(how, below)
    t = below.mul_(numbers.scale)
    floor = _floors(t, how, numbers)
    weights = token_weights(t)
    if floor is not None:
        weights.masked_fill_(t < floor, 0)
    return _walk_tree(weights.cumsum_(-1), numbers.uniform)


@dataclass(frozen=True, slots=True)
class _DrawParams:
    """Sampling parameters of rows on the logits' device; t is (logit - best logit) * scale."""

    top_p: Tensor
    """Parameter top_p of each row, [rows, 1] float64; 1 or more: no limit."""
    scale: Tensor
    """Factor log2(e) / temperature of each row, [rows, 1] float32."""
    floor: Tensor
    """Lowest t to keep in each row, log2(min_p), [rows, 1] float32; minus infinity: no limit."""
    top_k: Tensor
    """Parameter top_k of each row, [rows, 1] int64; 0: no limit."""
    uniform: Tensor
    """Random number in [0, 1) for each row and level of the tree walk, [rows, levels] float64."""


def _draw_params(how: NDArray[Any], like: Tensor) -> _DrawParams:
    """Copy parameters of dtype ``DRAW_ROW`` [rows] to the device of logits [rows, V], in one
    transfer."""
    vocab_size, num_levels = like.shape[1], 1
    while _BRANCHES**num_levels < vocab_size:
        num_levels += 1
    values = np.stack([how["seed"], how["choice"], how["index"]], axis=1)
    top_k = np.where(how["top_k"] < vocab_size, how["top_k"], 0)
    columns = np.stack([how["top_p"], how["scale"], how["floor"], top_k], axis=1)
    moved = to_device(np.concatenate([columns, uniforms(values, num_levels)], 1), like.device)
    top_p, scale, floor, limit = (moved[:, i : i + 1] for i in range(4))
    return _DrawParams(top_p, scale.float(), floor.float(), limit.long(), moved[:, 4:])


def token_weights(t: Tensor) -> Tensor:
    """Return the weights of tokens, 2 ** (t + 40) rounded to int64, for float32 t <= 0.

    The relative error before rounding is at most 2e-7; the bits equal those of ``c/weights.h``.
    """
    t = t.clamp(min=-2.0 - _WEIGHT_BITS)
    whole = t.round()
    rest = t.sub_(whole)
    power = rest * (_COEFFICIENTS[0] * 2.0**_WEIGHT_BITS)
    for coefficient in _COEFFICIENTS[1:-1]:
        power.add_(coefficient * 2.0**_WEIGHT_BITS).mul_(rest)
    power.add_(_COEFFICIENTS[-1] * 2.0**_WEIGHT_BITS)
    power.view(torch.int32).add_(whole.int().mul_(1 << 23))  # times 2 ** whole
    return power.round_().long()


def _floors(t: Tensor, how: NDArray[Any], numbers: _DrawParams) -> Tensor | None:
    """Return [rows, 1]: the t below which tokens are dropped; None if no row drops any token.

    t [rows, V] is (logit - best logit) * log2(e) / temperature.
    """
    has_top_p = bool((how["top_p"] < 1).any())
    if has_top_p or (how["top_k"] > 0).any():
        return torch.maximum(numbers.floor, _truncations(t, how["top_k"], numbers, has_top_p))
    return None if np.isneginf(how["floor"]).all() else numbers.floor


def _truncations(
    t: Tensor, top_k: NDArray[np.int64], numbers: _DrawParams, has_top_p: bool
) -> Tensor:
    """Return [rows, 1]: the lowest t that remains after top_k and then top_p.

    t [rows, V] is (logit - best logit) * log2(e) / temperature.
    """
    vocab_size = t.shape[1]
    limits = top_k[top_k < vocab_size]
    is_off = numbers.top_p >= 1
    width = min(vocab_size, max([_FIRST_CANDIDATES if has_top_p else 1, *limits]))
    while True:
        best = t.topk(width, -1).values
        last = best.gather(1, (numbers.top_k - 1).clamp(min=0))
        by_k = torch.where(numbers.top_k > 0, last, -math.inf)
        if not has_top_p:
            return by_k
        mass = token_weights(t).masked_fill_(t < by_k, 0).sum(-1, keepdim=True)
        reached = token_weights(best).cumsum_(-1).double() >= numbers.top_p * mass.double()
        is_wide = width == vocab_size  # a row that is not finite never reaches its share
        if is_wide or bool((reached.any(-1, True) | is_off).all()):  # device-to-host sync
            break
        width = min(vocab_size, width * 16)
    by_p = best.gather(1, reached.long().argmax(-1, keepdim=True))
    return torch.maximum(by_k, torch.where(is_off, -math.inf, by_p))


def _walk_tree(cumulative: Tensor, numbers: Tensor) -> Tensor:
    """Return tokens [rows] for cumulative weights [rows, V] int64, by a walk down a tree of tokens.

    ``numbers`` [rows, levels]: a random number in [0, 1) for each level. Each level divides the
    remaining interval of tokens into 16 parts, and selects one part by its weight.
    """
    device, vocab_size, num_levels = cumulative.device, cumulative.shape[1], numbers.shape[1]
    first = torch.zeros(len(cumulative), 1, dtype=torch.int64, device=device)
    for level in range(num_levels):
        width = _BRANCHES ** (num_levels - 1 - level)
        edges = first + width * torch.arange(_BRANCHES + 1, device=device)
        edges = edges.clamp_(max=vocab_size)
        below = cumulative.gather(1, (edges - 1).clamp_(min=0)).masked_fill_(edges == 0, 0)
        low, weight = below[:, :1], below[:, -1:] - below[:, :1]
        part = (numbers[:, level : level + 1] * weight.double()).long()
        target = low + torch.minimum(part, weight - 1)  # rounding must not reach the next token
        branch = torch.searchsorted(below[:, 1:].contiguous(), target, right=True)
        first = edges.gather(1, branch)
    return first.squeeze(1)


def uniforms(values: NDArray[np.uint64], num_levels: int) -> NDArray[np.float64]:
    """Return [rows, num_levels] random numbers in [0, 1) from seed, choice and index [rows, 3].

    The results must never change. Source: splitmix64 (Steele, Lea and Flood 2014), chained over the
    three values and the level.
    """
    state = _splitmix64(values[:, :1])
    for column in (values[:, 1:2], values[:, 2:], np.arange(num_levels, dtype=np.uint64)):
        state = _splitmix64(state ^ column)
    numbers: NDArray[np.float64] = (state >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return numbers


def _splitmix64(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the next state of the random number generator splitmix64, modulo 2 ** 64."""
    z = state + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
