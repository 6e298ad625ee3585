"""The interface of a transport: messages between the two pools.

A message has one or two two-dimensional tensors (parts), 4-byte items first. A ``Tag`` is its place
in the step; between two ranks, messages follow the global order of the step. Ranks in this
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
    """Place of a message in a step."""

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
    """Elements of a row."""
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
class Expected:
    """A message that one rank is to send."""

    rank: int
    parts: tuple[PartShape, ...]
    counts: tuple[int, ...]
    """Rows of each part; where the message is ``sized``, the most rows."""


class DataTransport(Protocol):
    """Moves messages between attention and expert ranks.

    Waits raise ``PeerLostError`` (edge broken, invalid data received, or ``step_timeout_s`` passed)
    and ``GenerationChangedError``. Received tensors own their memory.
    """

    sums_are_rounded: bool
    """Partial sums travel in the model's type, not in float32: half the bytes, for another
    rounding. The same on all workers of a cluster."""

    def begin_step(self, header: StepHeader) -> None:
        """Start a step, to which the messages that follow belong."""

    def post(self, tag: Tag, messages: Sequence[RowMessage], *, sized: bool) -> None:
        """Send at once, and wait only where buffers are full; the tensors may be reused afterwards.

        ``sized``: the receivers do not know the counts, so they travel along.
        """

    def receive(
        self, tag: Tag, expected: Sequence[Expected], *, sized: bool, must_wait: bool
    ) -> list[tuple[Tensor, ...]]:
        """One message from each of the ranks; the parts are on the transport's device.

        Waits for them where it ``must_wait``, as the host reads what is computed of them before
        ``finish_step``. Else it may return before they have come, with tensors that work on the
        device finds filled; where the header has a bucket, before many have come.
        """

    def finish_step(self) -> None:
        """Wait for all messages that were received in the step, before the host reads anything.

        Raises as ``receive``: what was computed of them is not to be used then.
        """

    def direct(self, ranks: Sequence[int]) -> DirectEdges | None:
        """The edges to some ranks, for native code in the step that has begun; None: there are
        none."""

    def reject(self, rank: int, reason: str) -> NoReturn:
        """Close the edge to a rank that sent invalid data. Raises ``PeerLostError``."""

    def apply_generation(self, generation: Generation) -> None:
        """Follow a new membership, after the peer connections. Raises as the waits do."""

    def close(self) -> None:
        """Release everything; the transport is not used again."""
