"""The leader's policy: how many rows each attention rank runs in a step. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from msgspec.structs import replace

from workers.engine.micro_batches import MicroBatchRule
from workers.requests.buckets import bucket_of
from workers.requests.step_header import WHOLE, Grant, StepHeader, StepProposal
from workers.requests.traced import MAX_TRACED, Parents

_ROUNDING = 8
"""Limits of edges are multiples of it: buffers have few sizes then."""


def decide_header(
    proposals: Mapping[int, StepProposal],
    *,
    generation: int,
    step: int,
    epoch: int,
    oldest_epoch: int,
    max_prefill_rows: int,
    micro_batches: MicroBatchRule,
    buckets: Sequence[int] = (),
    even_empty: bool = False,
) -> StepHeader | None:
    """The header of ``step``; None while there is nothing to run, unless ``even_empty``.

    ``proposals`` are those of all attention ranks of the generation. Decode rows are always
    granted. Prefill rows are capped at ``max_prefill_rows`` over all ranks; among the ranks that
    want some, the first to be served rotates with the step number, so none starves. The rule
    ``micro_batches`` applies to the granted rows. A proposal that must be alone gets the step for
    itself; among several, the choice rotates in the same way. Where no rank has prefill rows, they
    are filled up to one of ``buckets``, and rows on an edge are limited (``limit_edges``).

        4 ranks want 300 prefill rows each, cap 512, step 6: rank 2 gets 300, rank 3 gets 212
    """
    order = sorted(proposals)
    if not even_empty and not any(proposals[r].num_rows for r in order):
        return None
    alone = [r for r in order if proposals[r].is_alone and proposals[r].num_rows]
    if alone:
        chosen = alone[step % len(alone)]
        nothing = {"decode_rows": 0, "draft_rows": 0, "prefill_rows": 0}
        idle = {r: replace(p, **nothing) for r, p in proposals.items()}
        proposals = {**idle, chosen: proposals[chosen]}
    left = max_prefill_rows
    prefill = dict.fromkeys(order, 0)
    wanting = [rank for rank in order if proposals[rank].prefill_rows]
    for i in range(len(wanting)):
        rank = wanting[(step + i) % len(wanting)]
        prefill[rank] = min(proposals[rank].prefill_rows, left)
        left -= prefill[rank]
    grants = tuple((r, _grant(proposals[r], prefill[r])) for r in order)
    rows = [g.num_rows for _, g in grants]
    has_prefill = any(g.prefill_rows for _, g in grants)
    header = StepHeader(
        generation=generation,
        step=step,
        epoch=epoch,
        oldest_epoch=oldest_epoch,
        grants=grants,
        num_micro_batches=micro_batches.choose(rows, has_prefill),
        exact=has_prefill,
        is_alone=bool(alone),
        parents=_share_spans([(r, proposals[r].parents) for r, g in grants if g.num_rows], step),
    )
    if has_prefill:
        return header
    most = max(header.rows(rank, 0) for rank in order)
    bucket = bucket_of(most, buckets) if most else 0
    header = replace(header, bucket=bucket) if bucket else header
    limit = limit_edges([(header.edge_rows(rank, 0), proposals[rank].edge_share) for rank in order])
    if bucket and limit:  # few sizes, as each is captured apart
        limit = bucket_of(limit, buckets)
        limit = limit if limit < bucket else 0
    return replace(header, edge_limit=limit) if limit else header


def _grant(proposal: StepProposal, prefill_rows: int) -> Grant:
    return Grant(
        decode_rows=proposal.decode_rows,
        prefill_rows=prefill_rows,
        draft_rows=proposal.draft_rows,
    )


def _share_spans(
    asked: Sequence[tuple[int, Parents]], step: int
) -> tuple[tuple[int, Parents], ...]:
    """Of the spans that ranks ask for those that the step has: ``MAX_TRACED`` over all ranks.

    A worker of experts makes all of them. Every rank has its first before any has its second; the
    rank that begins rotates with the step number.
    """
    if not any(parents for _, parents in asked):
        return ()
    in_turn = sorted(
        (turn, (number - step) % len(asked), rank, parent)
        for number, (rank, parents) in enumerate(asked)
        for turn, parent in enumerate(parents)
    )
    chosen = {(rank, parent) for *_, rank, parent in in_turn[:MAX_TRACED]}
    shared = ((r, tuple(p for p in parents if (r, p) in chosen)) for r, parents in asked)
    return tuple((rank, parents) for rank, parents in shared if parents)


def limit_edges(ranks: Sequence[tuple[int, int]]) -> int:
    """Rows of a micro-batch to send each expert rank at most (``StepHeader.edge_limit``).

    ``ranks``: rows in a micro-batch, and ``StepProposal.edge_share``, of each attention rank. Room
    for the largest need of late and two standard deviations of a Poisson distribution, as the need
    varies like a sum of independent choices. 0, no limit, where that saves less than a quarter of
    the rows, or would limit a rank whose share is not known.
    """
    needed = max((-(-rows * share // WHOLE) for rows, share in ranks), default=0)
    limit = needed + math.ceil(2 * math.sqrt(needed))
    limit = -(-limit // _ROUNDING) * _ROUNDING
    most = max((rows for rows, _ in ranks), default=0)
    is_known = all(share or rows <= limit for rows, share in ranks)
    return limit if is_known and limit <= most * 3 // 4 else 0
