"""Expert banks that take a given time and compute nothing, for benchmarks of balance.

On a laptop all expert workers share the same cores, where an uneven load costs nothing by itself.
Paced ones wait instead: so long for each activated expert slot and for each pair, as devices of
their own would take. Outputs are zeros.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from workers.families.base import BankSpec


@dataclass(frozen=True, slots=True)
class Pace:
    """How long a bank takes."""

    slot_s: float
    """Seconds for each expert slot that has work."""
    token_s: float
    """Seconds for each (row, expert slot) pair."""

    def seconds(self, num_slots: int, num_pairs: int) -> float:
        """Of one exchange."""
        return self.slot_s * num_slots + self.token_s * num_pairs


class PacedBank:
    """One bank; what it waited too long is taken off the next wait."""

    def __init__(
        self,
        spec: BankSpec,
        pace: Pace,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._spec = spec
        self._pace = pace
        self._clock = clock
        self._sleep = sleep
        self._overslept_s = 0.0

    def compute(
        self, exchange: int, inputs: Tensor, pair_input: Tensor, pair_slot: Tensor
    ) -> Tensor:
        """See ``ExpertBank.compute``: zeros, after the time that they are to take."""
        began = self._clock()
        due = self._pace.seconds(len(set(pair_slot.tolist())), len(pair_slot)) - self._overslept_s
        left = began + due - self._clock()
        if left > 0:
            self._sleep(left)
        self._overslept_s = self._clock() - began - due
        return inputs.new_zeros(len(pair_slot), self._spec.exchanges[exchange].out_width)


class PacedSlots:
    """``SlotBanks`` of paced banks."""

    def __init__(self, specs: Sequence[BankSpec], pace: Pace) -> None:
        self._banks = tuple(PacedBank(spec, pace) for spec in specs)

    @property
    def banks(self) -> tuple[PacedBank, ...]:
        """By ``BankSpec.index``."""
        return self._banks
