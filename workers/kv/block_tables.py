"""Block tables of all running sequences in one array, which the model reads. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class BlockTables:
    """Persistent array with one row (seat) for each running sequence, to which blocks are appended.

    Example: a sequence in seat 1 has blocks 7 and 3. Then ``array[1, :2]`` is [7, 3].
    """

    def __init__(self, num_seats: int, max_blocks: int) -> None:
        self.array: NDArray[np.int32] = np.zeros((num_seats, max_blocks), dtype=np.int32)
        """[num_seats, max_blocks] int32; entries after a sequence's last block are undefined."""
        self._address = self.array.ctypes.data
        self._free = list(reversed(range(num_seats)))
        self._changes: dict[int, int] | None = None

    def take_seat(self) -> int:
        """Take a free row; there must be one."""
        return self._free.pop()

    def free_seat(self, seat: int) -> None:
        """Free the row of a sequence that has ended or was preempted."""
        self._free.append(seat)

    def put(self, seat: int, first: int, blocks: Sequence[int]) -> None:
        """Write blocks to the row ``seat``, from column ``first`` on."""
        self.array[seat, first : first + len(blocks)] = blocks
        if self._changes is not None:
            begin = seat * self.array.shape[1] + first
            self._changes.update(enumerate(blocks, begin))

    def follow(self) -> None:
        """Start to record changed entries; ``take_changes`` returns their latest values."""
        self._changes = {}

    def forget_changes(self) -> None:
        """Stop recording changes."""
        self._changes = None

    def take_changes(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return entries written since the last call: unique flat indices and their blocks."""
        found, self._changes = self._changes or {}, {}
        return np.array([*found], dtype=np.int64), np.array([*found.values()], dtype=np.int64)

    def address(self, seat: int) -> int:
        """Memory address of a row, for native kernels."""
        return self._address + seat * self.array.strides[0]
