"""Interface of a transport, which carries messages between the two pools.

A message has one or two two-dimensional tensors (parts), 4-byte items first. Its ``Tag`` is its
position in the step; between two ranks, messages follow the global order of the step. Ranks in this
interface are ranks in the *other* pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, NoReturn, Protocol

import torch
from torch import Tensor

from cluster.core.topology import Generation
from workers.requests.step_header import StepHeader
from workers.transport.direct import DirectEdges

Direction = Literal["rows", "outputs"]


class Tag(NamedTuple):
    """Position of a message in a step."""

    bank: int
    """``BankSpec.index``."""
    exchange: int
    """``ExchangeSpec.index``."""
    micro_batch: int
    """0 or 1."""
    direction: Direction
    """``rows`` to the experts (dispatch), ``outputs`` back (combine)."""


@dataclass(frozen=True, slots=True)
class PartShape:
    """Shape of one part: rows of ``width`` elements."""

    width: int
    """Number of elements in a row."""
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        return self.width * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class RowMessage:
    """A message to one rank."""

    rank: int
    parts: tuple[Tensor, ...]
    """One or two tensors [rows, width]."""


@dataclass(frozen=True, slots=True)
class ExpectedMessage:
    """A message that one rank will send."""

    rank: int
    parts: tuple[PartShape, ...]
    counts: tuple[int, ...]
    """Number of rows of each part; the maximum if the message is ``sized``."""


class DataTransport(Protocol):
    """Moves messages between attention and expert ranks.

    Waits raise ``PeerLostError`` (edge broken, invalid data received, or ``step_timeout_s`` passed)
    and ``GenerationChangedError``. Received tensors own their memory.
    """

    sums_are_rounded: bool
    """Whether partial sums are sent in the model's dtype instead of float32, with half the bytes
    and one more rounding. Equal on all workers of a cluster."""

    def begin_step(self, header: StepHeader) -> None:
        """Start a step. Later messages belong to it."""

    def post(self, tag: Tag, messages: Sequence[RowMessage], *, sized: bool) -> None:
        """Send messages, and wait only if buffers are full. The tensors may be reused afterwards.

        ``sized``: send the counts too, as the receivers do not know them.
        """

    def receive(
        self, tag: Tag, expected: Sequence[ExpectedMessage], *, sized: bool, must_wait: bool
    ) -> list[tuple[Tensor, ...]]:
        """Receive one message from each rank; the parts are on the transport's device.

        With ``must_wait`` it waits for the messages, as the host reads results before
        ``finish_step``. Otherwise it may return before they arrive, with tensors that are filled
        before later work on the device reads them; if the header has a bucket, many receives may
        be pending.
        """

    def finish_step(self) -> None:
        """Wait for all messages of the step. Call it before the host reads results.

        Raises as ``receive``; then the results must not be used.
        """

    def direct(self, ranks: Sequence[int]) -> DirectEdges | None:
        """Return the edges to some ranks for native code in the current step, or None."""

    def reject(self, rank: int, reason: str) -> NoReturn:
        """Close the edge to a rank that sent invalid data. Raises ``PeerLostError``."""

    def apply_generation(self, generation: Generation) -> None:
        """Apply a new membership, after the peer connections did. Raises as the waits do."""

    def close(self) -> None:
        """Release all resources. The transport cannot be used afterwards."""
