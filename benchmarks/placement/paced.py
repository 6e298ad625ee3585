"""Expert workers whose banks take a given time and compute nothing, for benchmarks of balance.

On a laptop all expert workers share the same cores, so an uneven load costs nothing by itself.
These banks wait a given time for each activated expert slot and each pair, as separate devices
would compute. Outputs are zeros.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.experts.slots import ExpertSlots
from workers.model.config import BankSpec
from workers.process.worker.actor import ExpertWorker, WorkerActor
from workers.process.worker.worker import OnDeath, Worker
from workers.process.worker_args import WorkerArgs


@dataclass(frozen=True, slots=True)
class ComputeTime:
    """Pace of a bank."""

    slot_s: float
    """Seconds for each activated expert slot."""
    token_s: float
    """Seconds for each (row, expert slot) pair."""

    def seconds(self, num_slots: int, num_pairs: int) -> float:
        """Seconds for one exchange."""
        return self.slot_s * num_slots + self.token_s * num_pairs


class PacedBank:
    """A bank that waits instead of computing; a wait that was too long shortens the next one."""

    version = 0

    def __init__(
        self,
        spec: BankSpec,
        time_taken: ComputeTime,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._spec = spec
        self.time_taken = time_taken
        self._clock = clock
        self._sleep = sleep
        self._overslept_s = 0.0

    def native(self, exchange: int) -> None:
        """See ``SlotBank``."""

    def compute(
        self, exchange: int, inputs: Tensor, pair_input: Tensor, pair_slot: Tensor
    ) -> Tensor:
        """See ``ExpertBank.compute``; returns zeros after the time that the pairs take."""
        self._wait(pair_slot)
        return inputs.new_zeros(len(pair_slot), self._spec.exchanges[exchange].out_width)

    def compute_rows(
        self, exchange: int, inputs: Tensor, slots: Tensor, weights: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """See ``ExpertBank.compute_rows``; as ``compute``."""
        self._wait(slots[slots >= 0])
        width = self._spec.exchanges[exchange].out_width
        return inputs.new_zeros(len(slots), width, dtype=dtype)

    def _wait(self, pair_slot: Tensor) -> None:
        began = self._clock()
        due = (
            self.time_taken.seconds(len(set(pair_slot.tolist())), len(pair_slot))
            - self._overslept_s
        )
        left = began + due - self._clock()
        if left > 0:
            self._sleep(left)
        self._overslept_s = self._clock() - began - due


def paced_worker(time_taken: ComputeTime) -> type[WorkerActor]:
    """An actor class for the role ``expert``. Ray sends it by value, with its times."""

    def banks_of(slots: ExpertSlots) -> list[PacedBank]:
        return [PacedBank(bank.spec, time_taken) for bank in slots.banks]

    class PacedWorker(ExpertWorker):
        """An expert worker that holds and moves weights, and waits instead of computing."""

        def _make_worker(self, args: WorkerArgs, on_death: OnDeath) -> Worker:
            return Worker(args, on_death, banks_of)

    return PacedWorker
