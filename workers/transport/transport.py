"""Interface of a transport, which carries messages between attention and expert ranks.

A message has one or two parts, which are two-dimensional tensors; a part with 4-byte elements is
first. Its ``Tag`` is its position in the step; two ranks exchange messages in the global order of
the step. In this interface, ``rank`` is always the rank of a worker in the *other* pool.
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
    """Number of rows of each part; if the message is ``sized``, the maximum number."""


class DataTransport(Protocol):
    """Moves messages between attention and expert ranks.

    Waits raise ``PeerLostError`` if an edge breaks, invalid data arrives or a wait takes too long,
    and ``GenerationChangedError`` if the generation ends. Received tensors own their memory.
    """

    sums_are_rounded: bool
    """Whether partial sums are sent in the model's dtype instead of float32, with half the bytes
    and one more rounding. Equal on all workers of a cluster."""

    def begin_step(self, header: StepHeader) -> None:
        """Start a step. Later messages belong to it."""

    def post(self, tag: Tag, messages: Sequence[RowMessage], *, sized: bool) -> None:
        """Send messages, and wait only if buffers are full. The tensors may be reused afterwards.

        ``sized``: also send the row counts, because the receivers do not know them.
        """

    def receive(
        self, tag: Tag, expected: Sequence[ExpectedMessage], *, sized: bool, must_wait: bool
    ) -> list[tuple[Tensor, ...]]:
        """Receive one message from each rank; the parts are on the transport's device.

        ``must_wait``: return after the messages have arrived, as the host will read them before
        ``finish_step``. Otherwise the method may return earlier, with tensors that are filled
        before later work on the device reads them. In a step with a bucket (a captured step),
        many receives may be pending at once.
        """

    def finish_step(self) -> None:
        """Wait for all messages of the step. Call it before the host reads results.

        Raises the errors of ``receive``; the results of the step must then not be used.
        """

    def direct(self, ranks: Sequence[int]) -> DirectEdges | None:
        """Return the edges to ``ranks`` for native code in this step, or None if it cannot run."""

    def reject(self, rank: int, reason: str) -> NoReturn:
        """Close the edge to a rank that sent invalid data. Raises ``PeerLostError``."""

    def apply_generation(self, generation: Generation) -> None:
        """Apply a generation that the peer connections have already applied. Raises as waits do."""

    def close(self) -> None:
        """Release all resources. The transport cannot be used afterwards."""
