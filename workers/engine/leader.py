"""The leader's policy: how many rows each attention rank runs in a step. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec.structs import replace

from workers.engine.micro_batches import MicroBatchRule
from workers.requests.step_header import Grant, StepHeader, StepProposal


def decide_header(
    proposals: Mapping[int, StepProposal],
    *,
    generation: int,
    step: int,
    epoch: int,
    oldest_epoch: int,
    max_prefill_rows: int,
    micro_batches: MicroBatchRule,
    even_empty: bool = False,
) -> StepHeader | None:
    """The header of ``step``; None while there is nothing to run, unless ``even_empty``.

    ``proposals`` are those of all attention ranks of the generation. Decode rows are always
    granted. Prefill rows are capped at ``max_prefill_rows`` over all ranks; among the ranks that
    want some, the first to be served rotates with the step number, so none starves. The rule
    ``micro_batches`` applies to the granted rows. A proposal that must be alone gets the step for
    itself; among several, the choice rotates in the same way.

        4 ranks want 300 prefill rows each, cap 512, step 6: rank 2 gets 300, rank 3 gets 212
    """
    order = sorted(proposals)
    if not even_empty and not any(proposals[r].num_rows for r in order):
        return None
    alone = [r for r in order if proposals[r].is_alone and proposals[r].num_rows]
    if alone:
        chosen = alone[step % len(alone)]
        idle = {r: replace(p, decode_rows=0, prefill_rows=0) for r, p in proposals.items()}
        proposals = {**idle, chosen: proposals[chosen]}
    left = max_prefill_rows
    prefill = dict.fromkeys(order, 0)
    wanting = [rank for rank in order if proposals[rank].prefill_rows]
    for i in range(len(wanting)):
        rank = wanting[(step + i) % len(wanting)]
        prefill[rank] = min(proposals[rank].prefill_rows, left)
        left -= prefill[rank]
    grants = tuple(
        (r, Grant(decode_rows=proposals[r].decode_rows, prefill_rows=prefill[r])) for r in order
    )
    rows = [g.num_rows for _, g in grants]
    has_prefill = any(g.prefill_rows for _, g in grants)
    return StepHeader(
        generation=generation,
        step=step,
        epoch=epoch,
        oldest_epoch=oldest_epoch,
        grants=grants,
        num_micro_batches=micro_batches.choose(rows, has_prefill),
        exact=has_prefill,
        is_alone=bool(alone),
    )
