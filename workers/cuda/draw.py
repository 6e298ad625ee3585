"""Sampling of one token from each row of logits, in one kernel. One program samples a row.

The method and all results are those of ``workers.sampling.draws``, the reference, to the last bit.
A token's weight is an integer, so that the order of additions does not matter.

The limits of top_k and top_p are found by a radix search: the bits of the last logit that is kept
are determined two by two, the highest first. It reads only the largest logits of a row, unless
these are too few. Their lower bound is computed in the same way, from the largest logit of each
column of a tile (``_TILE`` columns).
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.cuda.triton_common import jit

MAX_VOCAB_SIZE = 1 << 20
"""Maximum number of logits in a row."""
_TILE = 4096
"""Number of logits that a program processes at a time."""
_SPAN = 256
"""Number of consecutive logits with one stored sum of weights."""
_WARPS = 16
_BRANCHES = tl.constexpr(16)
"""See ``_BRANCHES`` of ``workers.sampling.draws``."""
_MIN_EXPONENT = tl.constexpr(-42.0)
"""Exponent with a weight that is rounded to 0; lower ones are raised to it."""
_ROUNDER = tl.constexpr(1.5 * 2**23)
"""Float32 that rounds a number below 2**22 to an integer when it is added."""
_FIRST_CANDIDATES = tl.constexpr(256)
"""Number of largest logits that are read first for top_p without top_k."""


def draw_rows(logits: Tensor, params: Tensor, is_masked: bool) -> Tensor:
    """Sample a token from each row of logits [T, V]; returns [T] int64.

    params [T, 6] int64 of any strides: sampling parameters in the memory layout of
    ``workers.native.draws.DRAW_ROW``. ``is_masked``: logits of minus infinity forbid their tokens.
    The result is -1 for a row with NaN or infinity, and -2 if all its tokens are forbidden.
    """
    num_rows, vocab_size = logits.shape
    assert vocab_size <= MAX_VOCAB_SIZE, f"{vocab_size} logits"
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    num_spans = triton.cdiv(vocab_size, _SPAN)
    largest = logits.new_empty(num_rows, max(vocab_size, _TILE))
    sums = torch.empty(num_rows, num_spans, dtype=torch.int64, device=logits.device)
    num_levels = 1
    while _BRANCHES.value**num_levels < vocab_size:
        num_levels += 1
    if num_rows:
        _draw[(num_rows,)](
            logits,
            params,
            largest,
            sums,
            tokens,
            vocab_size,
            logits.stride(0),
            params.stride(0),
            params.stride(1),
            int(is_masked),
            NUM_BITS=16 if logits.dtype == torch.bfloat16 else 32,
            NUM_LEVELS=num_levels,
            TILE=_TILE,
            SPAN=_SPAN,
            num_warps=_WARPS,
            enable_fp_fusion=False,  # products are rounded, as in torch
        )
    return tokens


@partial(jit, any_alignment=["logits", "row_params", "largest", "sums", "tokens"])
def _draw(
    logits: tl.pointer_type,
    row_params: tl.pointer_type,
    largest: tl.pointer_type,
    sums: tl.pointer_type,
    tokens: tl.pointer_type,
    vocab_size: tl.tensor,
    logits_stride: tl.tensor,
    row_stride: tl.tensor,
    param_stride: tl.tensor,
    is_masked: tl.tensor,
    NUM_BITS: tl.constexpr,
    NUM_LEVELS: tl.constexpr,
    TILE: tl.constexpr,
    SPAN: tl.constexpr,
) -> None:
    """Sample the token of one row in each program."""
    row = tl.program_id(0).to(tl.int64)
    own = logits + row * logits_stride
    kept = largest + row * tl.maximum(vocab_size, TILE)
    spans = sums + row * tl.cdiv(vocab_size, SPAN)
    row_params += row * row_stride
    factors = tl.load(row_params + 4 * param_stride)
    scale = factors.to(tl.int32).to(tl.float32, bitcast=True)

    columns = tl.arange(0, TILE)
    column_max = tl.full([TILE], float("-inf"), dtype=tl.float32)
    places = tl.zeros([TILE], dtype=tl.int32)
    invalid = tl.zeros([TILE], dtype=tl.int32)
    for start in range(0, vocab_size, TILE):
        is_token = start + columns < vocab_size
        x = tl.load(own + start + columns, mask=is_token, other=float("-inf")).to(tl.float32)
        invalid += (is_token & ((tl.abs(x) < float("inf")) == 0)).to(tl.int32)  # also NaN
        places = tl.where(x > column_max, start + columns, places)
        column_max = tl.maximum(x, column_max)
    best = tl.max(column_max, 0)
    token = tl.min(tl.where(column_max == best, places, vocab_size), 0).to(tl.int64)
    if is_masked:
        token = tl.where(tl.abs(best) < float("inf"), token, -2)
    else:
        token = tl.where(tl.sum(invalid, 0) > 0, -1, token)
    if (token >= 0) & (scale > 0):
        floor = _floor(
            own, row_params, param_stride, kept, column_max, best, vocab_size, NUM_BITS, TILE
        )
        floor = tl.maximum(floor, (factors >> 32).to(tl.int32).to(tl.float32, bitcast=True))
        first = tl.arange(0, TILE // SPAN)
        for start in range(0, vocab_size, TILE):
            ids = start + first[:, None] * SPAN + tl.arange(0, SPAN)[None, :]
            weight = tl.sum(_load_weights(own, ids, vocab_size, best, scale, floor), 1)
            is_span = start + first * SPAN < vocab_size
            tl.store(spans + start // SPAN + first, weight, mask=is_span)
        tl.debug_barrier()  # all threads of the program read the sums
        token = _descend(
            own, row_params, param_stride, spans, vocab_size, best, scale, floor, NUM_LEVELS, SPAN
        )
    tl.store(tokens + row, token)


@jit
def _floor(
    logits: tl.tensor,
    row_params: tl.tensor,
    param_stride: tl.tensor,
    kept: tl.tensor,
    column_max: tl.tensor,
    best: tl.tensor,
    vocab_size: tl.tensor,
    NUM_BITS: tl.constexpr,
    TILE: tl.constexpr,
) -> tl.tensor:
    """Return the lowest t = (logit - best) * scale that remains after top_k and then top_p.

    column_max [TILE]: the largest logit of each column of tiles. ``kept``: memory for the largest
    logits.
    """
    scale = tl.load(row_params + 4 * param_stride).to(tl.int32).to(tl.float32, bitcast=True)
    top_p = tl.load(row_params + 3 * param_stride).to(tl.float64, bitcast=True)
    top_k = tl.load(row_params + 5 * param_stride)
    top_k = tl.where(top_k < vocab_size, top_k, 0)
    floor = tl.full([], float("-inf"), tl.float32)
    if (top_k > 0) | (top_p < 1.0):
        lower_bound = tl.full([], float("-inf"), tl.float32)
        num_wanted = tl.where(top_k > 0, top_k, _FIRST_CANDIDATES)
        if num_wanted <= TILE // 2:
            tl.store(kept + tl.arange(0, TILE), column_max.to(kept.dtype.element_ty))
            tl.debug_barrier()
            lower_bound = _last(
                kept, TILE, num_wanted.to(tl.float64), best, scale, False, NUM_BITS, TILE
            )
            tl.debug_barrier()
        count, mass = _gather(logits, kept, vocab_size, lower_bound, best, scale, TILE)
        if top_k > 0:
            last = _last(kept, count, top_k.to(tl.float64), best, scale, False, NUM_BITS, TILE)
            floor = (last - best) * scale
            mass = _mass(kept, count, best, scale, floor, TILE)
        if top_p < 1.0:
            target = top_p * mass.to(tl.float64)
            if _mass(kept, count, best, scale, float("-inf"), TILE).to(tl.float64) < target:
                last = _last(logits, vocab_size, target, best, scale, True, NUM_BITS, TILE)
            else:
                last = _last(kept, count, target, best, scale, True, NUM_BITS, TILE)
            floor = (last - best) * scale
    return floor


@jit
def _gather(
    logits: tl.tensor,
    kept: tl.tensor,
    vocab_size: tl.tensor,
    lower_bound: tl.tensor,
    best: tl.tensor,
    scale: tl.tensor,
    TILE: tl.constexpr,
) -> tl.tensor:
    """Write the logits from ``lower_bound`` on to ``kept``; return their number, and the weight of
    all tokens."""
    columns = tl.arange(0, TILE)
    count = tl.full([], 0, tl.int32)
    mass = tl.zeros([TILE], dtype=tl.int64)
    for start in range(0, vocab_size, TILE):
        is_token = start + columns < vocab_size
        x = tl.load(logits + start + columns, mask=is_token, other=float("-inf"))
        mass += _weights(x.to(tl.float32), best, scale, float("-inf"))
        is_kept = is_token & (x.to(tl.float32) >= lower_bound)
        more = tl.sum(is_kept.to(tl.int32), 0)
        if more > 0:
            places = count + tl.cumsum(is_kept.to(tl.int32), 0) - 1
            tl.store(kept + places, x, mask=is_kept)
        count += more
    tl.debug_barrier()  # all threads of the program read the logits
    return count, tl.sum(mass, 0)


@jit
def _mass(
    kept: tl.tensor,
    count: tl.tensor,
    best: tl.tensor,
    scale: tl.tensor,
    floor: tl.tensor,
    TILE: tl.constexpr,
) -> tl.tensor:
    """Return the weight of ``count`` logits from ``floor`` on."""
    total = tl.zeros([TILE], dtype=tl.int64)
    for start in range(0, count, TILE):
        ids = start + tl.arange(0, TILE)
        total += _load_weights(kept, ids, count, best, scale, floor)
    return tl.sum(total, 0)


@jit
def _last(
    kept: tl.tensor,
    count: tl.tensor,
    target: tl.tensor,
    best: tl.tensor,
    scale: tl.tensor,
    IS_WEIGHED: tl.constexpr,
    NUM_BITS: tl.constexpr,
    TILE: tl.constexpr,
) -> tl.tensor:
    """Return the largest of ``count`` logits with which the number, or the weight, of all logits
    that are not lower reaches ``target``."""
    one = tl.full([], 1, tl.uint32)
    prefix = one - one
    for digit in range(NUM_BITS // 2):
        shift = 30 - 2 * digit
        low = tl.zeros([TILE], dtype=tl.int64)
        middle = tl.zeros([TILE], dtype=tl.int64)
        high = tl.zeros([TILE], dtype=tl.int64)
        for start in range(0, count, TILE):
            ids = start + tl.arange(0, TILE)
            x = tl.load(kept + ids, mask=ids < count, other=float("-inf")).to(tl.float32)
            amount = (ids < count).to(tl.int64)
            if IS_WEIGHED:
                amount *= _weights(x, best, scale, float("-inf"))
            bits = x.to(tl.uint32, bitcast=True)
            key = bits ^ tl.where(bits >> 31 != 0, 0xFFFFFFFF, 0x80000000)  # ordered as the logits
            low += tl.where(key >= (prefix | (one << shift)), amount, 0)
            middle += tl.where(key >= (prefix | (2 * one << shift)), amount, 0)
            high += tl.where(key >= (prefix | (3 * one << shift)), amount, 0)
        chosen = (tl.sum(low, 0).to(tl.float64) >= target).to(tl.uint32)
        chosen += (tl.sum(middle, 0).to(tl.float64) >= target).to(tl.uint32)
        chosen += (tl.sum(high, 0).to(tl.float64) >= target).to(tl.uint32)
        prefix |= chosen << shift
    if NUM_BITS == 16:  # the key of a negative bfloat16 ends with ones
        prefix = tl.where(prefix >> 31 != 0, prefix, prefix | 0xFFFF)
    bits = prefix ^ tl.where(prefix >> 31 != 0, 0x80000000, 0xFFFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@jit
def _descend(
    logits: tl.tensor,
    row_params: tl.tensor,
    param_stride: tl.tensor,
    spans: tl.tensor,
    vocab_size: tl.tensor,
    best: tl.tensor,
    scale: tl.tensor,
    floor: tl.tensor,
    NUM_LEVELS: tl.constexpr,
    SPAN: tl.constexpr,
) -> tl.tensor:
    """Walk down the tree of tokens, with a random number for each level; return the token.

    ``spans``: sum of weights of each span of consecutive tokens.
    """
    seed = tl.load(row_params).to(tl.uint64, bitcast=True)
    choice = tl.load(row_params + param_stride).to(tl.uint64, bitcast=True)
    index = tl.load(row_params + 2 * param_stride).to(tl.uint64, bitcast=True)
    state = _splitmix64(_splitmix64(_splitmix64(seed) ^ choice) ^ index)
    first = tl.full([], 0, tl.int64)
    for level in tl.static_range(NUM_LEVELS):
        uniform = (_splitmix64(state ^ level) >> 11).to(tl.float64) * 2.0**-53
        first = _choose_branch(
            logits,
            spans,
            vocab_size,
            first,
            uniform,
            best,
            scale,
            floor,
            WIDTH=_BRANCHES ** (NUM_LEVELS - 1 - level),
            SPAN=SPAN,
        )
    return first


@jit
def _choose_branch(
    logits: tl.tensor,
    spans: tl.tensor,
    vocab_size: tl.tensor,
    first: tl.tensor,
    uniform: tl.tensor,
    best: tl.tensor,
    scale: tl.tensor,
    floor: tl.tensor,
    WIDTH: tl.constexpr,
    SPAN: tl.constexpr,
) -> tl.tensor:
    """Return the first token of the chosen branch of the node that begins at token ``first``; each
    branch has ``WIDTH`` tokens."""
    branches = tl.arange(0, _BRANCHES)[:, None]
    if WIDTH >= SPAN:
        inner = tl.arange(0, WIDTH // SPAN)[None, :]
        place = first // SPAN + branches * (WIDTH // SPAN) + inner
        weights = tl.load(spans + place, mask=place < tl.cdiv(vocab_size, SPAN), other=0)
    else:
        ids = first + branches * WIDTH + tl.arange(0, WIDTH)[None, :]
        weights = _load_weights(logits, ids, vocab_size, best, scale, floor)
    by_branch = tl.sum(weights, 1)
    total = tl.sum(by_branch, 0)
    part = (uniform * total.to(tl.float64)).to(tl.int64)
    part = tl.minimum(part, total - 1)  # rounding must not reach the next branch
    return first + tl.sum((tl.cumsum(by_branch, 0) <= part).to(tl.int64), 0) * WIDTH


@jit
def _splitmix64(state: tl.tensor) -> tl.tensor:
    """See ``uniforms`` of ``workers.sampling.draws``."""
    z = state + 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@jit
def _load_weights(
    logits: tl.tensor,
    ids: tl.tensor,
    count: tl.tensor,
    best: tl.tensor,
    scale: tl.tensor,
    floor: tl.tensor,
) -> tl.tensor:
    """Return the weights of the logits ``ids``, int64; 0 from ``count`` on and below ``floor``."""
    x = tl.load(logits + ids, mask=ids < count, other=float("-inf"))
    return _weights(x.to(tl.float32), best, scale, floor)


@jit
def _weights(x: tl.tensor, best: tl.tensor, scale: tl.tensor, floor: tl.tensor) -> tl.tensor:
    """Return the weights of logits, int64: see ``token_weights`` of ``workers.sampling.draws``."""
    exponent = (x - best) * scale
    t = tl.maximum(exponent, _MIN_EXPONENT)
    shifted = t + _ROUNDER
    rest = t - (shifted - _ROUNDER)
    power = rest * (0.0013264723820611835 * 2.0**40)
    power = (power + 0.009671512991189957 * 2.0**40) * rest
    power = (power + 0.05550733581185341 * 2.0**40) * rest
    power = (power + 0.24022242426872253 * 2.0**40) * rest
    power = (power + 0.6931470036506653 * 2.0**40) * rest
    power += 2.0**40
    bits = power.to(tl.int32, bitcast=True) + (shifted.to(tl.int32, bitcast=True) << 23)
    power = bits.to(tl.float32, bitcast=True)  # times 2 ** (t - rest)
    near = (power + 2.0**23) - 2.0**23  # rounded to an integer, ties to even
    weight = tl.where(power < 2.0**23, near, power).to(tl.int64)
    return tl.where(exponent < floor, 0, weight)
