"""All expert slots of one device: which physical experts it holds, loaded from the checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from cluster.placement import FREE_SLOT, ExpertPlacement
from workers.checkpoint import Checkpoint
from workers.experts.bank import ExpertBank, make_kernel
from workers.experts.kernels_invariant import InvariantKernels
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
        self._buffers: dict[tuple[int, int], Tensor] = {}

    @property
    def banks(self) -> tuple[ExpertBank, ...]:
        """By ``BankSpec.index``."""
        return self._banks

    def load_expert(self, bank: int, slot: int, expert: int, checkpoint: Checkpoint) -> None:
        """Read one logical expert into a slot, matrix by matrix. Raises ``CheckpointError``."""
        target = self._banks[bank]
        for exchange in target.spec.exchanges:
            matrices = checkpoint.family.expert_matrices(
                target.spec, exchange.index, expert, checkpoint.tensors
            )
            for i, matrix in enumerate(matrices):
                weight = checkpoint.read_stacked(
                    matrix.parts, target.dtype, self._buffer(matrix.shape, target.dtype)
                )
                target.store(slot, exchange.index, i, weight)

    def _buffer(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Where matrices of a shape are read to, one after the other.

        Fresh memory for each would leave holes between the packed weights that stay, a third of
        their size in a bank of 512 x 256 experts.
        """
        if shape not in self._buffers:
            self._buffers[shape] = torch.empty(shape, dtype=dtype)
        return self._buffers[shape]

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
        try:
            for bank, slot, expert in work:
                self.load_expert(bank, slot, expert, checkpoint)
        finally:
            self._buffers.clear()
            checkpoint.close()
