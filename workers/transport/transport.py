"""Interface of a transport, which carries messages between attention and expert ranks.

A message has one or two parts, which are two-dimensional tensors; a part with 4-byte elements is
first. The ``Tag`` of a message is its position in the step; two ranks exchange messages in the
global order of the step. In this interface, ``rank`` is always the rank of a worker in the *other*
pool: an expert rank on the attention side, an attention rank on the expert side.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, NoReturn, Protocol

import torch
from torch import Tensor

from cluster.core.topology import Generation
from workers.cuda.step_graph import StepGraph
from workers.requests.step_header import StepHeader
from workers.transport.direct import DirectEdges

Direction = Literal["rows", "outputs"]


class Tag(NamedTuple):
    """Position of a message between attention and expert ranks in a step."""

    bank: int
    """Index of the expert bank (``BankSpec.index``)."""
    exchange: int
    """Index of the exchange in its bank (``ExchangeSpec.index``)."""
    micro_batch: int
    """Index of the micro-batch, 0 or 1."""
    direction: Direction
    """``rows`` for a message to the experts (dispatch), ``outputs`` for a reply (combine)."""


@dataclass(frozen=True, slots=True)
class PartShape:
    """Shape and dtype of one part of a message: a tensor of rows."""

    width: int
    """Number of elements in a row."""
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        return self.width * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class RowMessage:
    """A message to one rank of the other pool."""

    rank: int
    parts: tuple[Tensor, ...]
    """Data of the message: one or two tensors [rows, width]."""


@dataclass(frozen=True, slots=True)
class ExpectedMessage:
    """Description of a message that one rank of the other pool will send."""

    rank: int
    parts: tuple[PartShape, ...]
    counts: tuple[int, ...]
    """Number of rows of each part; the maximum number if the message carries its own counts."""


def empty_messages(
    expected: Sequence[ExpectedMessage],
    device: torch.device,
    counts: Sequence[Sequence[int]] | None = None,
) -> list[tuple[Tensor, ...]]:
    """Return uninitialized tensors for messages with equal parts, except the numbers of rows.

    The same parts of all messages are adjacent in memory. ``counts`` overrides the numbers of rows.
    """
    if not expected:
        return []
    columns = []
    for index, part in enumerate(expected[0].parts):
        rows = [numbers[index] for numbers in counts or [item.counts for item in expected]]
        whole = torch.empty(sum(rows), part.width, dtype=part.dtype, device=device)
        columns.append(torch.split_with_sizes(whole, rows))
    return list(zip(*columns, strict=True))


class CapturedMessages(Protocol):
    """Messages that are part of a CUDA graph: each replay sends and receives them again."""

    def post(self, tag: Tag, messages: Sequence[RowMessage]) -> None:
        """Capture the sends of ``messages``; see ``DataTransport.post``."""

    def receive(self, tag: Tag, expected: Sequence[ExpectedMessage]) -> list[tuple[Tensor, ...]]:
        """Capture the receives of the ``expected`` messages; return the tensors that they fill."""


class DataTransport(Protocol):
    """Sends and receives messages between attention and expert ranks, on one worker.

    Waits raise ``PeerLostError`` if an edge breaks, invalid data arrives or a wait takes too long,
    and ``GenerationChangedError`` if the generation ends. Received tensors own their memory.
    """

    sums_are_rounded: bool
    """Whether partial sums are sent in the model's dtype instead of float32, with half the bytes
    and one more rounding. Equal on all workers of a cluster."""

    def begin_step(self, header: StepHeader) -> None:
        """Start a step, to which all messages until the next call belong."""

    def post(self, tag: Tag, messages: Sequence[RowMessage], *, sized: bool) -> None:
        """Send messages with the position ``tag``; wait only if buffers are full.

        The caller may overwrite tensors with rows afterwards, but not outputs. ``sized``: also send
        the row counts, because the receivers do not know them.
        """

    def receive(
        self, tag: Tag, expected: Sequence[ExpectedMessage], *, sized: bool, must_wait: bool
    ) -> list[tuple[Tensor, ...]]:
        """Receive one message from each expected rank; the parts are on the transport's device.

        ``sized``: the messages carry their row counts. ``must_wait``: return after the messages
        have arrived, as the host will read them before ``finish_step``. If it is False, the method
        may return earlier, with tensors that are filled before later work on the device reads them.
        """

    def finish_step(self) -> None:
        """Wait for all messages of the step. Call it before the host reads results.

        Raises ``PeerLostError`` and ``GenerationChangedError``; the results of the step are then
        invalid.
        """

    def finish_later(self) -> Callable[[], None]:
        """On an attention rank, after a replay of captured messages: return a function that does
        the work of ``finish_step`` and ``await_confirmation`` for this step.

        The function may be called after the next step has begun; if it is not called, all messages
        of this step are dropped. Raises ``PeerLostError`` and ``GenerationChangedError``.
        """

    def confirm_step(self) -> None:
        """On an expert rank, after ``finish_step``: tell the attention ranks that all rows arrived.

        Outputs that a rank has sent may be wrong if it aborts a receive on which they depend.
        """

    def await_confirmation(self) -> None:
        """On an attention rank, after ``finish_step``: wait until all expert ranks have confirmed
        the step. Raises ``PeerLostError`` and ``GenerationChangedError``."""

    @property
    def captured_state(self) -> Hashable:
        """A value that changes when ``CapturedMessages`` become invalid; None if there are none."""

    def capture(self, graph: StepGraph) -> CapturedMessages | None:
        """Return messages that become part of ``graph``, whose capture is under way.

        ``finish_step`` then waits for each replay. Returns None if the host takes part in every
        message, so that they cannot be captured.
        """

    def direct(self, ranks: Sequence[int]) -> DirectEdges | None:
        """Return the edges to ``ranks`` with which native code sends and receives in this step.

        None if native code cannot use this transport or one of the edges.
        """

    def reject(self, rank: int, reason: str) -> NoReturn:
        """Close the edge to a rank that sent invalid data. Raises ``PeerLostError``."""

    def apply_generation(self, generation: Generation) -> None:
        """Apply a generation that ``PeerConnections`` has already applied.

        Raises ``PeerLostError`` and ``GenerationChangedError``.
        """

    def close(self) -> None:
        """Release all resources. The transport cannot be used afterwards."""
