"""What an attention worker has counted: tokens by expert and by copy, as it goes to the controller.

Counts only grow while a worker lives, so a report may be lost, or come twice. On the wire a bank's
numbers are packed little-endian integers of the narrowest width, in base64: 62 layers of 128
experts with two copies are 0.2 MB, and take a millisecond.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.errors import ProtocolError

Counts = npt.NDArray[np.int64]
BankKey = tuple[str, int]
"""Kind of bank and layer."""
_MAX_NUMBERS = 1 << 22
"""Numbers of one bank that are taken from the wire."""
_TYPES = ("u1", "u2", "u4", "u8")


@dataclass(frozen=True, kw_only=True, slots=True)
class BankCounts:
    """One bank: tokens (pairs of a row and a chosen expert) of committed steps."""

    prefill: Counts
    """[num_experts] prompt rows, since the worker's start."""
    decode: Counts
    """[num_experts] decode rows, since the worker's start."""
    epoch_prefill: Counts
    """[num_experts, copies] prompt rows of this placement epoch, by the copy that served them;
    copies are in the order of ``BankPlacement.logical_to_physical``."""
    epoch_decode: Counts
    """[num_experts] decode rows of this epoch; one copy of each expert served them."""

    @property
    def num_experts(self) -> int:
        """Logical experts."""
        return len(self.prefill)

    @property
    def total(self) -> Counts:
        """[num_experts] all rows, since the worker's start."""
        return self.prefill + self.decode

    @classmethod
    def zeros(cls, num_experts: int, num_copies: int = 1) -> BankCounts:
        """Nothing counted yet."""
        return cls(
            prefill=np.zeros(num_experts, dtype=np.int64),
            decode=np.zeros(num_experts, dtype=np.int64),
            epoch_prefill=np.zeros((num_experts, num_copies), dtype=np.int64),
            epoch_decode=np.zeros(num_experts, dtype=np.int64),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadReport:
    """All counts of one attention worker at one moment."""

    epoch: int
    """Placement epoch that ``epoch_prefill`` and ``epoch_decode`` belong to."""
    rows: int
    """Rows of committed steps since the worker's start."""
    banks: Mapping[BankKey, BankCounts]
    """By kind and layer, in the order of the model."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the control sockets."""
        banks = [[*key, *_pack(counts)] for key, counts in self.banks.items()]
        return {"epoch": self.epoch, "rows": self.rows, "banks": banks}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LoadReport:
        """Inverse of ``to_dict``. Raises ``ProtocolError``."""
        try:
            banks = {
                (str(bank), int(layer)): _unpack(int(experts), int(copies), str(kind), str(text))
                for bank, layer, experts, copies, kind, text in data["banks"]
            }
            return cls(epoch=int(data["epoch"]), rows=int(data["rows"]), banks=banks)
        except (KeyError, TypeError, ValueError, AttributeError) as err:
            raise ProtocolError(f"not a load report: {err!r}") from err


def sum_by_copy(one: Counts, other: Counts) -> Counts:
    """Add [num_experts, copies] arrays that may differ in the number of copies."""
    total = np.zeros((len(one), max(one.shape[1], other.shape[1])), dtype=np.int64)
    total[:, : one.shape[1]] = one
    total[:, : other.shape[1]] += other
    return total


def _pack(counts: BankCounts) -> tuple[int, int, str, str]:
    """Experts, copies, type of the numbers, and the numbers."""
    parts = (counts.prefill, counts.decode, counts.epoch_prefill.ravel(), counts.epoch_decode)
    joined = np.concatenate(parts)
    largest = int(joined.max(initial=0))
    kind = next(k for k in _TYPES if largest <= np.iinfo(k).max)
    text = base64.b64encode(joined.astype(f"<{kind}").tobytes()).decode()
    return counts.num_experts, counts.epoch_prefill.shape[1], kind, text


def _unpack(experts: int, copies: int, kind: str, text: str) -> BankCounts:
    size = experts * (3 + copies)
    if kind not in _TYPES or experts < 1 or copies < 1 or size > _MAX_NUMBERS:
        raise ValueError(f"{experts} experts, {copies} copies, numbers of type {kind}")
    data = base64.b64decode(text, validate=True)
    if len(data) != size * np.dtype(kind).itemsize:
        raise ValueError(f"{len(data)} bytes for {size} numbers")
    numbers = np.frombuffer(data, dtype=f"<{kind}").astype(np.int64)
    if int(numbers.min()) < 0:
        raise ValueError("counts must be below 2**63")
    ends = [experts, 2 * experts, (2 + copies) * experts]
    prefill, decode, epoch_prefill, epoch_decode = np.split(numbers, ends)
    return BankCounts(
        prefill=prefill,
        decode=decode,
        epoch_prefill=epoch_prefill.reshape(experts, copies),
        epoch_decode=epoch_decode,
    )
