"""Times of steps of a prefill group and a decode group, and ``--share-experts auto``. Pure.

Groups that share expert workers lengthen each other's steps. Between two exchanges of decodes, an
expert worker computes parts of a prompt's exchange, and ends the last one before it serves decodes:

    decode rows    d    gap    | late |    d    gap    | late |
    prompt rows       part  part  part        part  part  part

    late           part / 2, but at least part - gap: in each gap a part begins
    prefill step   other time + experts / s,  s = (gap + late) / (d + gap + late)
    decode step    + exchanges x (experts / s) / prefill step x late

Groups with expert workers of their own do not wait, but each has only a part of these workers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from cluster.config.workers import WorkersSection
from cluster.core.group_placement import PART_ROWS_PER_EXPERT
from cluster.sizing.mixed_step import PoolSizes, RankRows, StepTimes
from cluster.sizing.roofline import DeviceSpec, ModelSize, StepTime


class GroupSizes(NamedTuple):
    """Numbers of workers of a cluster with two step groups."""

    num_prefill: int
    num_decode: int
    num_experts: int
    num_prefill_experts: int = 0
    """Expert workers of the prefill group alone; the others belong to the decode group. 0 if both
    groups share all."""

    @classmethod
    def of(cls, workers: WorkersSection) -> GroupSizes:
        """Return the sizes of the first workers of a cluster with step groups."""
        prefill = workers.num_prefill_workers or 0
        decode = workers.num_attention_ranks - prefill
        return cls(prefill, decode, workers.num_expert_workers, workers.num_prefill_experts)

    @property
    def text(self) -> str:
        """Text such as ``1 prefill + 2 decode + 2 expert workers``."""
        own = self.num_prefill_experts
        experts = f"{own} + {self.num_experts - own}" if own else f"{self.num_experts}"
        return f"{self.num_prefill} prefill + {self.num_decode} decode + {experts} expert workers"


class GroupSteps:
    """Computes the times of the steps of both groups, on equal workers."""

    def __init__(
        self,
        model: ModelSize,
        sizes: GroupSizes,
        device: DeviceSpec,
        *,
        balancedness: float = 1.0,
        seed: int = 0,
    ) -> None:
        own, every = sizes.num_prefill_experts, sizes.num_experts
        pools = (
            PoolSizes(num_attention=sizes.num_prefill, num_experts=own or every),
            PoolSizes(num_attention=sizes.num_decode, num_experts=every - own),
        )
        self.sizes = sizes
        self.prefill, self.decode = (
            StepTimes(model, each, device, balancedness=balancedness, seed=seed) for each in pools
        )
        self.num_exchanges = model.num_exchanges
        """Exchanges with experts in a step."""
        divides = not device.kernel_s  # GPUs compute an exchange as a whole
        self._part_rows = min(
            (PART_ROWS_PER_EXPERT * b.num_experts / b.top_k for b in model.banks if divides),
            default=None,
        )

    @property
    def is_shared(self) -> bool:
        """Whether the groups share all expert workers."""
        return not self.sizes.num_prefill_experts

    def part_s(self, prefill: StepTime) -> float:
        """Return the seconds that an expert worker computes a prompt's exchange without serving
        decodes."""
        whole_s = prefill.experts_s / self.num_exchanges
        if self._part_rows is None:
            return whole_s
        return min(whole_s, self.prefill.experts_s(self._part_rows) / self.num_exchanges)

    def late_s(self, decode: StepTime, prefill: StepTime) -> float:
        """Return the mean seconds for which an exchange of decodes waits, if the expert workers
        have prompt rows."""
        part_s, gap_s = self.part_s(prefill), self._gap_s(decode)
        return max(part_s / 2, part_s - gap_s)

    def chance(self, decode: StepTime, prefill: StepTime) -> float:
        """Return the probability that expert workers have prompt rows during a prefill step."""
        step_s = self.prefill_s(prefill, decode)
        return 1.0 - max(prefill.step_s - experts_s(prefill), 0.0) / step_s

    def decode_s(self, decode: StepTime, prefill: StepTime) -> float:
        """Return the mean seconds of a decode step while the prefill group runs steps."""
        if not self.is_shared:
            return decode.step_s
        late_s = self.chance(decode, prefill) * self.late_s(decode, prefill)
        return decode.step_s + self.num_exchanges * late_s

    def prefill_s(self, prefill: StepTime, decode: StepTime) -> float:
        """Return the mean seconds of a prefill step while the decode group runs steps."""
        if not self.is_shared:
            return prefill.step_s
        free_s = self._gap_s(decode) + self.late_s(decode, prefill)
        busy_s = experts_s(decode) / self.num_exchanges
        return prefill.step_s + experts_s(prefill) * busy_s / free_s

    def _gap_s(self, decode: StepTime) -> float:
        """Return the mean seconds between two exchanges of a decode step."""
        return max(decode.step_s - experts_s(decode), 0.0) / self.num_exchanges


def experts_s(step: StepTime) -> float:
    """Return the seconds of a step in which expert workers compute."""
    return step.num_micro_batches * step.experts_s


def choose_sharing(
    workers: WorkersSection,
    model: ModelSize,
    *,
    num_seqs: int,
    step_tokens: int,
    context_tokens: float,
    device: DeviceSpec,
    memory_bytes: float | None = None,
) -> WorkersSection:
    """Return ``workers`` with ``share_experts`` auto, if given, replaced by yes or no, for which
    ``mode_reason`` has the reason.

    The choice has the larger product of two rates while both groups are busy: decode steps, each of
    ``num_seqs`` rows a worker with ``context_tokens`` of context, and prompt rows, ``step_tokens``
    in a step of each worker. ``memory_bytes``: free memory of all hosts, which must have room for
    all experts twice; None if unknown.
    """
    if workers.share_experts != "auto":
        return workers
    shared = replace(workers, share_experts="yes")
    if workers.num_expert_workers < 2:
        return replace(shared, mode_reason="step groups share the only expert worker")
    num_bytes = sum(
        2 * bank.num_experts * bank.memory_bytes(model.itemsize) for bank in model.banks
    )
    if memory_bytes is not None and num_bytes > memory_bytes:
        gb = f"{num_bytes / 1e9:.3g} GB, of {memory_bytes / 1e9:.3g} GB free"
        reason = f"step groups share all experts, as two copies of each would have {gb}"
        return replace(shared, mode_reason=reason)
    rates = []
    apart = replace(workers, share_experts="no")
    for section in (shared, apart):
        steps = GroupSteps(model, GroupSizes.of(section), device)
        rows = RankRows(num_seqs, num_seqs, round(num_seqs * context_tokens))
        decode = steps.decode.step([rows] * steps.sizes.num_decode, has_prefill=False)
        prompt = RankRows(step_tokens, 1, round(context_tokens))
        prefill = steps.prefill.step([prompt] * steps.sizes.num_prefill, has_prefill=True)
        num_rows = step_tokens * steps.sizes.num_prefill
        rates.append((steps.decode_s(decode, prefill), num_rows / steps.prefill_s(prefill, decode)))
    (shared_s, shared_rate), (apart_s, apart_rate) = rates
    is_apart = apart_rate / apart_s > shared_rate / shared_s
    what = "have expert workers of their own" if is_apart else "share all experts"
    reason = (
        f"step groups {what}: predicted are decode steps of {1e3 * shared_s:.3g} ms beside "
        f"{shared_rate:.3g} prompt rows/s if they share them, {1e3 * apart_s:.3g} ms and "
        f"{apart_rate:.3g} rows/s if not, by {device.name} numbers"
    )
    return replace(apart if is_apart else shared, mode_reason=reason)
