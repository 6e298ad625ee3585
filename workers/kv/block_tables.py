"""The block tables of running sequences in one array, which models read. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class BlockTables:
    """A row for each running sequence, its seat: blocks are appended, and no step builds it anew.

    For example, a sequence in seat 1 that has blocks 7 and 3: ``array[1, :2]`` is [7, 3].
    """

    def __init__(self, num_seats: int, max_blocks: int) -> None:
        self.array: NDArray[np.int32] = np.zeros((num_seats, max_blocks), dtype=np.int32)
        """[num_seats, max_blocks]: what stands behind a sequence's blocks means nothing."""
        self._address = self.array.ctypes.data
        self._free = list(reversed(range(num_seats)))
        self._changes: dict[int, int] | None = None

    def take_seat(self) -> int:
        """A free row; there must be one."""
        return self._free.pop()

    def free_seat(self, seat: int) -> None:
        """The sequence of this row has ended, or waits again."""
        self._free.append(seat)

    def put(self, seat: int, first: int, blocks: Sequence[int]) -> None:
        """Write blocks from place ``first`` of a row on."""
        self.array[seat, first : first + len(blocks)] = blocks
        if self._changes is not None:
            begin = seat * self.array.shape[1] + first
            self._changes.update(enumerate(blocks, begin))

    def follow(self) -> None:
        """Keep changes for ``take_changes``, of each place the last one."""
        self._changes = {}

    def forget_changes(self) -> None:
        """Keep them no more."""
        self._changes = None

    def take_changes(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """What was written since the last call: places in the flat array, each once, and blocks."""
        found, self._changes = self._changes or {}, {}
        return np.array([*found], dtype=np.int64), np.array([*found.values()], dtype=np.int64)

    def address(self, seat: int) -> int:
        """Where a row begins in memory, for native kernels."""
        return self._address + seat * self.array.strides[0]
