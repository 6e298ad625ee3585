"""The leader's policy: the number of rows of each attention rank in a step. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import add, mul
from typing import NamedTuple

from workers.engine.micro_batches import MicroBatchRule
from workers.engine.step_proposals import ProposalTable, StepProposal
from workers.requests.buckets import BUCKETS, bucket_of
from workers.requests.step_header import ALL_ROWS, MAX_MICRO_BATCHES, Grants, StepHeader
from workers.requests.traced import MAX_TRACED, Parents

_ROUNDING = 8
"""Granularity of edge limits, in rows, so that buffers have few sizes."""
_NOTHING = StepProposal(rank=0, decode_rows=0, prefill_rows=0)


class StepSize(NamedTuple):
    """Size of a captured step."""

    bucket: int
    """Rows of each attention rank in a micro-batch, with padding."""
    num_micro_batches: int


def decide_header(
    proposals: ProposalTable,
    *,
    generation: int,
    step: int,
    epoch: int,
    oldest_epoch: int,
    max_prefill_rows: int,
    micro_batches: MicroBatchRule,
    buckets: Sequence[int] = (),
    has_static_prompts: bool = False,
    even_empty: bool = False,
    idle_size: StepSize | None = None,
) -> StepHeader | None:
    """Decide the header of ``step`` from the proposals of all attention ranks.

    Returns None if no rank wants a row, unless ``even_empty``, or with ``idle_size``: then the step
    has only padding of this size, so that it is captured. ``proposals`` must be complete. Decode
    rows are always granted. Prefill rows are capped at ``max_prefill_rows`` over all ranks. The
    first rank to get prefill rows rotates with the step number, so that no rank starves.
    ``micro_batches`` is applied to the granted rows. A proposal for a solo step (rows of only one
    request) gets the whole step; if there are several, the choice rotates with the step number. If
    no rank has prefill rows, decode rows are padded to one of
    ``buckets`` and the rows on an edge are limited (``limit_edges``). A step with prefill rows is
    exact, unless ``has_static_prompts``: then every expert rank receives all rows, and no host must
    wait for their number.

    Example: if 4 ranks propose 300 prefill rows each and the cap is 512, then in step 6 rank 2
    gets 300 rows, rank 3 gets 212 and the others none.
    """
    wanted = proposals.in_order
    alone = [p.rank for p in wanted if p.is_alone and p.num_rows]
    if alone:
        chosen = alone[step % len(alone)]
        wanted = [p if p.rank == chosen else _NOTHING for p in wanted]
    decode_rows = [p.decode_rows for p in wanted]
    prefill_rows = [p.prefill_rows for p in wanted]
    is_idle = not (any(decode_rows) or any(prefill_rows))
    if is_idle and not even_empty and idle_size is None:
        return None
    prefill_rows = _share_prefill(prefill_rows, max_prefill_rows, step)
    has_prefill = any(prefill_rows)
    rows = list(map(add, decode_rows, prefill_rows)) if has_prefill else decode_rows
    most = max(rows)
    num_micro_batches = micro_batches.choose(most, has_prefill)
    bucket = edge_limit = 0
    if is_idle and idle_size is not None:
        bucket, num_micro_batches = idle_size
    elif most and not has_prefill:
        bucket = bucket_of(-(-most // num_micro_batches), buckets)
        edge_limit = _edge_limit(wanted, num_micro_batches, bucket, buckets)
    drafts = [p.draft_rows for p in wanted]
    parents: list[tuple[int, Parents]] = []
    if [p for p in wanted if p.parents]:
        parents = [(p.rank, p.parents) for p, n in zip(wanted, rows, strict=True) if n]
    return StepHeader(
        generation=generation,
        step=step,
        epoch=epoch,
        oldest_epoch=oldest_epoch,
        grants=Grants.of_rows(proposals.packed_ranks, decode_rows, prefill_rows, drafts),
        num_micro_batches=num_micro_batches,
        exact=has_prefill and not has_static_prompts,
        edge_limit=edge_limit,
        bucket=bucket,
        is_alone=bool(alone),
        parents=_choose_parents(parents, step),
    )


def _share_prefill(wanted: list[int], left: int, step: int) -> list[int]:
    """Share ``left`` prompt rows among the ranks that want some. The first rotates by step."""
    if not any(wanted):
        return wanted
    granted = [0] * len(wanted)
    wanting = [rank for rank, rows in enumerate(wanted) if rows]
    first = step % len(wanting)
    for rank in (*wanting[first:], *wanting[:first]):
        granted[rank] = min(wanted[rank], left)
        left -= granted[rank]
    return granted


def _edge_limit(
    wanted: Sequence[StepProposal], num_micro_batches: int, bucket: int, buckets: Sequence[int]
) -> int:
    """Return ``StepHeader.edge_limit`` of a step of decodes."""
    sending = [p for p in wanted if p.decode_rows]
    rows = [bucket or -(-p.decode_rows // num_micro_batches) for p in sending]
    limit = limit_edges(rows, [p.edge_share for p in sending])
    if bucket and limit:  # few sizes, because each is a separate capture
        limit = bucket_of(limit, buckets)
        limit = limit if limit < bucket else 0
    return limit


def step_sizes(buckets: Sequence[int], micro_batches: MicroBatchRule) -> tuple[StepSize, ...]:
    """Return the sizes of captured steps without an edge limit, those with most rows first.

    ``buckets`` must be ascending. Smaller graphs share the memory of larger ones.
    """
    most = buckets[-1] if buckets else 0
    if most == BUCKETS[-1]:  # two micro-batches may have more
        most *= MAX_MICRO_BATCHES
    sizes = (_size_of(rows, buckets, micro_batches) for rows in range(most, 0, -1))
    return tuple(dict.fromkeys(size for size in sizes if size.bucket))


def _size_of(rows: int, buckets: Sequence[int], micro_batches: MicroBatchRule) -> StepSize:
    number = micro_batches.choose(rows, has_prefill=False)
    return StepSize(bucket_of(-(-rows // number), buckets), number)


def _choose_parents(
    requested: Sequence[tuple[int, Parents]], step: int
) -> tuple[tuple[int, Parents], ...]:
    """Choose the parent trace spans of a step, at most ``MAX_TRACED`` over all ranks.

    Each expert worker creates a span below each chosen parent. Every rank gets its first parent
    before any rank gets its second; the first rank rotates with the step number.
    """
    if not any(parents for _, parents in requested):
        return ()
    in_turn = sorted(
        (turn, (number - step) % len(requested), rank, parent)
        for number, (rank, parents) in enumerate(requested)
        for turn, parent in enumerate(parents)
    )
    chosen = {(rank, parent) for *_, rank, parent in in_turn[:MAX_TRACED]}
    shared = ((r, tuple(p for p in parents if (r, p) in chosen)) for r, parents in requested)
    return tuple((rank, parents) for rank, parents in shared if parents)


def limit_edges(rows: Sequence[int], shares: Sequence[int]) -> int:
    """Return ``StepHeader.edge_limit``: the maximum rows of a micro-batch for each expert rank.

    ``rows``, ``shares``: rows in a micro-batch and ``StepProposal.edge_share`` of each rank. The
    limit is the largest recent need plus two standard deviations of a Poisson distribution, as the
    need varies like a sum of independent choices. The result is 0 (no limit) if a limit would save
    less than a quarter of the rows, or if the share of a rank with more rows than the limit is
    unknown.
    """
    needed = -(-max(map(mul, rows, shares), default=0) // ALL_ROWS)
    limit = needed + math.ceil(2 * math.sqrt(needed))
    limit = -(-limit // _ROUNDING) * _ROUNDING
    is_known = all(shares) or all(
        share or n <= limit for n, share in zip(rows, shares, strict=True)
    )
    return limit if is_known and limit <= max(rows, default=0) * 3 // 4 else 0
