"""Token counts by expert and by copy, which an attention worker reports to the controller.

Counts only grow while a worker lives, so a report may be lost or arrive twice. The codec sends an
array in the smallest sufficient integer type: 62 layers of 128 experts with two copies take 0.2 MB.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from cluster.core.codec import Message

Counts = npt.NDArray[np.int64]
BankKey = tuple[str, int]
"""Key of an expert bank: its kind (``mlp`` or ``attention``) and its layer."""


class BankCounts(Message, frozen=True, kw_only=True):
    """Counts of (row, chosen expert) pairs of one bank, in committed steps of one attention
    worker."""

    prefill: Counts
    """Number of pairs of prompt rows for each expert since the worker's start, [num_experts]."""
    decode: Counts
    """Number of pairs of decode rows for each expert since the worker's start, [num_experts]."""
    epoch_prefill: Counts
    """Number of pairs of prompt rows in the current placement epoch, by the copy that computed
    them, [num_experts, copies]. Copies are in the order of
    ``BankPlacement.logical_to_physical``."""
    epoch_decode: Counts
    """Number of pairs of decode rows in the current placement epoch, which the primary copy of each
    expert computed, [num_experts]."""

    def __post_init__(self) -> None:
        experts, copies = len(self.prefill), self.epoch_prefill.shape[-1]
        shapes = (self.prefill.shape, self.decode.shape, self.epoch_decode.shape)
        is_whole = set(shapes) == {(experts,)} and self.epoch_prefill.shape == (experts, copies)
        if not is_whole or experts < 1 or copies < 1:
            raise ValueError(f"counts of shapes {shapes} and {self.epoch_prefill.shape}")

    @property
    def num_experts(self) -> int:
        """Number of logical experts."""
        return len(self.prefill)

    @classmethod
    def zeros(cls, num_experts: int, num_copies: int = 1) -> BankCounts:
        """Create counts that are all zero."""
        return cls(
            prefill=np.zeros(num_experts, dtype=np.int64),
            decode=np.zeros(num_experts, dtype=np.int64),
            epoch_prefill=np.zeros((num_experts, num_copies), dtype=np.int64),
            epoch_decode=np.zeros(num_experts, dtype=np.int64),
        )


class LoadReport(Message, frozen=True, kw_only=True):
    """Expert load that one attention worker has counted since its start."""

    epoch: int
    """Placement epoch of ``epoch_prefill`` and ``epoch_decode``."""
    rows: int
    """Number of rows of committed steps since the worker's start."""
    banks: Mapping[BankKey, BankCounts]
    """Counts by kind and layer of the bank, in the order of the model."""


def sum_by_copy(one: Counts, other: Counts) -> Counts:
    """Return the sum of two [num_experts, copies] arrays, which may differ in the number of
    copies."""
    total = np.zeros((len(one), max(one.shape[1], other.shape[1])), dtype=np.int64)
    total[:, : one.shape[1]] = one
    total[:, : other.shape[1]] += other
    return total
