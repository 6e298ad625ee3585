"""All expert slots of one device, and the physical experts in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from cluster.core.placement import FREE_SLOT, ExpertPlacement
from workers.experts.bank import ExpertBank, make_kernel
from workers.experts.kernels_invariant import InvariantKernels
from workers.experts.kernels_native import unsupported_feature
from workers.experts.sources import CheckpointSource, ExpertSource
from workers.model.compute_threads import ComputeThreads
from workers.model.config import BankSpec
from workers.model.loading.checkpoint import Checkpoint
from workers.model.side_stream import SideStream
from workers.native.library import find_library
from workers.native.rounding import round_weight
from workers.native.thread_team import ThreadTeam
from workers.quantization.matrix import Weight


@dataclass(frozen=True, slots=True, eq=False)
class LoadedExpert:
    """Record of one load of a logical expert into an expert slot. Each load makes a new object, so
    a reader can detect that the slot was overwritten."""

    expert: int


def torch_reason(banks: Sequence[BankSpec], dtype: torch.dtype) -> str:
    """Return, for logs, why torch computes experts instead of the compiled CPU kernels; ``""`` if
    the kernels support all experts."""
    missing = {
        unsupported_feature(exchange, dtype) for bank in banks for exchange in bank.exchanges
    }
    names = " and ".join(sorted(missing - {""}))
    return f"torch for experts: no kernel has {names}" if names else ""


class ExpertSlots:
    """The expert banks of one device. There may be more slots than the placement fills."""

    def __init__(
        self,
        banks: Sequence[BankSpec],
        num_slots: int,
        dtype: torch.dtype,
        device: torch.device,
        compute_threads: ComputeThreads | None = None,
        deterministic: bool = False,
        team: ThreadTeam | None = None,
    ) -> None:
        """Create ``num_slots`` empty expert slots in every bank.

        ``team`` runs the experts that its compiled kernels support; torch with ``compute_threads``
        runs all other experts. Raises ``ConfigError`` if ``deterministic`` is set and this machine
        has no batch-invariant kernel.
        """
        threads = compute_threads or ComputeThreads()
        other = InvariantKernels().make if deterministic else None
        self._side = SideStream(device)
        self._team = team
        self._device = device
        make = partial(
            make_kernel, compute_threads=threads, team=team, make_other=other, side=self._side
        )
        self.banks = tuple(ExpertBank(spec, num_slots, dtype, device, make) for spec in banks)
        """Banks by ``BankSpec.index``."""
        self._contents = [dict[int, LoadedExpert]() for _ in banks]

    def contents(self, bank: int) -> dict[int, int]:
        """Return the logical expert of each slot with complete weights, by slot."""
        return {slot: held.expert for slot, held in self._contents[bank].copy().items()}

    def rows(self) -> tuple[tuple[int, ...], ...]:
        """Return the logical expert in each slot, as [bank][slot]; ``FREE_SLOT`` for a slot without
        complete weights."""
        found = []
        for bank in range(len(self.banks)):
            held = self.contents(bank)
            num_slots = max(held, default=-1) + 1
            found.append(tuple(held.get(slot, FREE_SLOT) for slot in range(num_slots)))
        return tuple(found)

    def read_expert(self, bank: int, expert: int) -> list[Weight] | None:
        """Return copies of an expert's matrices (``BankSpec.matrices``); None if no slot holds it.

        Any thread may call it. If the slot is overwritten during the copy, the result is None,
        never a mixture of two experts.
        """
        if bank >= len(self.banks):
            return None
        found = [(s, h) for s, h in self._contents[bank].copy().items() if h.expert == expert]
        if not found:
            return None
        slot, held = found[0]
        source = self.banks[bank]
        try:
            matrices = [source.read(slot, exchange, i) for exchange, i, _ in source.spec.matrices]
        except IndexError:  # the slot was freed during the copy
            return None
        return matrices if self._contents[bank].get(slot) is held else None

    def follow_steps(self) -> None:
        """Make later writes to freed slots wait until all GPU work queued by steps so far, which
        may read these slots, has finished. On a CPU, do nothing."""
        self._side.follow()

    def load_expert(
        self, bank: int, slot: int, expert: int, source: ExpertSource, is_idle: bool = False
    ) -> Iterator[None]:
        """Read one logical expert into a slot: each iteration reads one matrix.

        ``is_idle``: no step runs in this process, so all threads may help. Raises the errors of the
        source; the slot is then empty.
        """
        target = self.banks[bank]
        self.forget(bank, slot)
        for exchange, matrix, weight in source.weights(target.spec, expert, target.dtype):
            target.store(slot, exchange, matrix, weight, is_idle)
            yield
        self._contents[bank][slot] = LoadedExpert(expert)

    def forget(self, bank: int, slot: int) -> LoadedExpert | None:
        """Mark a slot as empty, without freeing its weights. Returns the record of the expert that
        the slot held, or None.

        Call it before checking for the last time that the slot is unused, so that ``contents`` does
        not list an expert that is about to be overwritten.
        """
        return self._contents[bank].pop(slot, None)

    def restore(self, bank: int, slot: int, held: LoadedExpert | None) -> None:
        """Undo ``forget``, given the record that it returned; None changes nothing."""
        if held is not None:
            self._contents[bank][slot] = held

    def clear(self, bank: int, slot: int) -> None:
        """Remove the expert in a slot. The caller must know that no step uses the slot."""
        self.forget(bank, slot)
        self.banks[bank].clear(slot)

    def keep_only(
        self,
        used: Sequence[Sequence[int]],
        min_slots: int,
        is_needed: Callable[[int, int], bool] = lambda bank, slot: False,
    ) -> int:
        """Free the memory of slots that no step uses; return the number of these slots that held an
        expert.

        ``used[bank][slot]``: an expert, or -1 if the slot is unused. ``is_needed(bank, slot)``:
        whether to keep a slot that is unused in ``used``. ``min_slots``: number of slots that each
        bank keeps at least.
        """
        num_freed = 0
        for bank, slots in enumerate(used):
            wanted = {slot for slot, expert in enumerate(slots) if expert != FREE_SLOT}
            for slot in self._contents[bank].keys() - wanted:
                held = self.forget(bank, slot)
                if is_needed(bank, slot):
                    self.restore(bank, slot, held)
                    wanted.add(slot)
                else:
                    self.clear(bank, slot)
                    num_freed += 1
            num_slots = max(wanted, default=-1) + 1
            if self.banks[bank].num_slots > max(num_slots, min_slots):
                self.banks[bank].resize(max(num_slots, min_slots))
        return num_freed

    def load_all(self, checkpoint: Checkpoint) -> None:
        """Load expert e of every bank into slot e (for a single process)."""
        rows = [list(range(b.spec.num_experts)) for b in self.banks]
        self._load(rows, checkpoint, self.checkpoint_source(checkpoint, is_idle=True))

    def load_placement(
        self,
        placement: ExpertPlacement,
        device: int,
        checkpoint: Checkpoint,
        source: ExpertSource | None = None,
    ) -> None:
        """Load the experts that a placement assigns to one device, from the checkpoint by default.

        Closes ``source``. Raises ``CheckpointError``.
        """
        rows = [bank.physical_to_logical[device] for bank in placement.banks]
        source = source or self.checkpoint_source(checkpoint, is_idle=True)
        self._load(rows, checkpoint, source)

    def checkpoint_source(
        self,
        checkpoint: Checkpoint,
        take: Callable[[int], None] = lambda num_bytes: None,
        is_idle: bool = False,
    ) -> CheckpointSource:
        """Return a source that reads experts from the checkpoint's files.

        ``take``: see ``CheckpointSource``. ``is_idle``: no step runs in this process, so all
        threads may quantize. Experts of compiled kernels or GPUs are quantized by compiled kernels,
        others by torch.
        """
        team = self._team
        library = None if team is None else team.library
        if self._device.type == "cuda":
            library = find_library().library
        rounder = partial(round_weight, library, team=team if is_idle else None)
        return CheckpointSource(checkpoint, take, rounder)

    def _load(
        self, by_bank: Sequence[Sequence[int]], checkpoint: Checkpoint, source: ExpertSource
    ) -> None:
        """Load ``by_bank[bank][slot]``, a logical expert, into each slot; close ``source``."""
        work = [
            (bank, slot, expert)
            for bank, slots in enumerate(by_bank)
            for slot, expert in enumerate(slots)
            if expert != FREE_SLOT
        ]
        checkpoint.expect(
            sum(checkpoint.expert_bytes(self.banks[b].spec, expert) for b, _, expert in work)
        )
        for bank, slots in enumerate(by_bank):
            if len(slots) > self.banks[bank].num_slots:
                self.banks[bank].resize(len(slots))
        try:
            for bank, slot, expert in work:
                for _ in self.load_expert(bank, slot, expert, source, is_idle=True):
                    pass
        finally:
            source.close()
