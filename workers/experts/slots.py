"""All expert slots of one device: which physical experts it holds, loaded from the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from cluster.placement import FREE_SLOT, ExpertPlacement
from workers.checkpoint import Checkpoint
from workers.experts.bank import ExpertBank, make_kernel
from workers.experts.kernels_invariant import InvariantKernels
from workers.experts.sources import CheckpointSource, ExpertSource
from workers.families.base import BankSpec
from workers.lanes import Lanes


class ExpertSlots:
    """The banks of one device. Capacity is apart from the copies that are planned for it."""

    def __init__(
        self,
        banks: Sequence[BankSpec],
        num_slots: int,
        dtype: torch.dtype,
        device: torch.device,
        lanes: Lanes | None = None,
        deterministic: bool = False,
    ) -> None:
        """``num_slots`` empty expert slots in every bank.

        Raises ``ConfigError`` where this machine cannot be deterministic.
        """
        fast = partial(make_kernel, lanes=lanes or Lanes())
        make = InvariantKernels().make if deterministic else fast
        self._banks = tuple(ExpertBank(spec, num_slots, dtype, device, make) for spec in banks)

    @property
    def banks(self) -> tuple[ExpertBank, ...]:
        """By ``BankSpec.index``."""
        return self._banks

    def load_expert(
        self, bank: int, slot: int, expert: int, source: ExpertSource
    ) -> Iterator[None]:
        """Read one logical expert into a slot, matrix by matrix: a turn of the iterator each.

        Raises what the source raises.
        """
        target = self._banks[bank]
        for exchange, matrix, weight in source.weights(target.spec, expert, target.dtype):
            target.store(slot, exchange, matrix, weight)
            yield

    def load_all(self, checkpoint: Checkpoint) -> None:
        """Expert e of every bank into slot e (a single process)."""
        self._load([list(range(b.spec.num_experts)) for b in self._banks], checkpoint)

    def load_placement(
        self, placement: ExpertPlacement, device: int, checkpoint: Checkpoint
    ) -> None:
        """What a placement gives one device. Raises ``CheckpointError``."""
        self._load([bank.physical_to_logical[device] for bank in placement.banks], checkpoint)

    def _load(self, by_bank: Sequence[Sequence[int]], checkpoint: Checkpoint) -> None:
        """``by_bank[bank][slot]`` is the logical expert."""
        work = [
            (bank, slot, expert)
            for bank, slots in enumerate(by_bank)
            for slot, expert in enumerate(slots)
            if expert != FREE_SLOT
        ]
        checkpoint.expect(
            sum(checkpoint.expert_bytes(self._banks[b].spec, expert) for b, _, expert in work)
        )
        for bank, slots in enumerate(by_bank):
            if len(slots) > self._banks[bank].num_slots:
                self._banks[bank].resize(len(slots))
        source = CheckpointSource(checkpoint)
        try:
            for bank, slot, expert in work:
                for _ in self.load_expert(bank, slot, expert, source):
                    pass
        finally:
            source.close()
