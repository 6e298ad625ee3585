"""Transport over the worker's own TCP connections, the default on CPUs.

Unlike torch.distributed, this transport needs no new groups after a failure: closing a connection
aborts its messages, a reset reveals a lost peer, and edges between surviving workers stay open.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from cluster.config.cluster import CombineMode
from cluster.core.topology import Generation
from workers.cuda.step_graph import StepGraph
from workers.requests.step_header import StepHeader
from workers.transport.direct import DirectEdges
from workers.transport.frames import EXACT, PER_SLOT, Frame, FrameHeader, FrameKind
from workers.transport.peer_connections import PeerConnections
from workers.transport.transport import ExpectedMessage, RowMessage, Tag

_KINDS = {"rows": FrameKind.ROWS, "outputs": FrameKind.OUTPUTS}


class SocketTransport:
    """``DataTransport`` that sends messages as frames on the worker's TCP connections to peers.

    GPU tensors are copied via host memory.
    """

    sums_are_rounded = False
    """Whether partial sums are sent in the model's dtype: no, they are float32."""

    def __init__(
        self,
        connections: PeerConnections,
        *,
        combine_mode: CombineMode,
        device: torch.device,
        group: int = 0,
    ) -> None:
        """``group``: on an expert worker, the index in ``Generation.groups`` of the step group with
        which it exchanges messages.
        """
        self._connections = connections
        self._group = group
        self._device = device
        self._returns_slots = combine_mode == "per_slot"
        self._mode_flag = 0
        self._flags = 0
        self._generation = 0
        self._step = 0
        self._names: dict[int, str] = {}
        self._direct: DirectEdges | None = None
        self._direct_names: list[str] = []

    def apply_generation(self, generation: Generation) -> None:
        """Apply a generation. The edges to the workers of the other pool must be open."""
        self._names = {m.rank: m.name for m in generation.peers_of(self._connections.me.role)}
        self._generation = generation.number
        self._mode_flag = PER_SLOT if self._returns_slots or generation.returns_slots else 0

    def begin_step(self, header: StepHeader) -> None:
        """Start a step. Frames of earlier steps are dropped."""
        self._step = header.step
        self._connections.begin_step(header.step, self._group)
        self._flags = self._mode_flag | (EXACT if header.exact else 0)

    def direct(self, ranks: Sequence[int]) -> DirectEdges | None:
        """Return the edges to ``ranks`` for native code in this step; None if it must not run."""
        names = [self._names[rank] for rank in ranks]
        direct = self._direct
        if direct is None or self._direct_names != names or not direct.are_open:
            direct = self._direct = self._connections.direct(names)
            self._direct_names = names
        if direct is not None:
            step = direct.step
            step.generation, step.number, step.flags = self._generation, self._step, self._flags
        return direct

    def post(self, tag: Tag, messages: Sequence[RowMessage], *, sized: bool) -> None:
        """Send messages; wait only if the send buffers are full.

        ``sized`` has no effect, as a frame always carries its row counts.
        """
        for message in messages:
            parts = [part.cpu().contiguous() for part in message.parts]  # device-to-host sync
            buffers = [_memory(part) for part in parts]
            first, second, *_ = (*(part.shape[0] for part in parts), 0, 0)
            header = self._header(tag, (first, second), sum(map(len, buffers)))
            self._connections.send(self._names[message.rank], header, buffers)

    def receive(
        self, tag: Tag, expected: Sequence[ExpectedMessage], *, sized: bool, must_wait: bool
    ) -> list[tuple[Tensor, ...]]:
        """Wait for one message from each expected rank, and return the tensors.

        ``must_wait`` has no effect, as the method always waits.
        """
        deadline = time.monotonic() + self._connections.step_timeout_s
        want = self._header(tag)
        received = []
        names = [self._names[item.rank] for item in expected]
        for i, item in enumerate(expected):
            frame = self._connections.receive(names[i], want, deadline, names[i + 1 :])
            self._check(item, frame.header, sized)
            received.append(self._tensors(item, frame))
        return received

    def finish_step(self) -> None:
        """Do nothing, as ``receive`` has waited for all messages."""

    def finish_later(self) -> NoReturn:
        raise AssertionError("messages over sockets are not captured")

    def confirm_step(self) -> None:
        """Do nothing: outputs are only sent after the rows have arrived."""

    def await_confirmation(self) -> None:
        """Return at once: outputs are only sent after the rows have arrived."""

    @property
    def captured_state(self) -> None:
        """None, as the host sends and receives each message."""

    def capture(self, graph: StepGraph) -> None:
        """Return None, as the host sends and receives each message."""

    def reject(self, rank: int, reason: str) -> NoReturn:
        self._connections.reject(self._names[rank], reason)

    def close(self) -> None:
        """Do nothing: the connections belong to ``PeerConnections``."""

    def _header(self, tag: Tag, counts: tuple[int, int] = (0, 0), length: int = 0) -> FrameHeader:
        return FrameHeader(
            _KINDS[tag.direction],
            self._generation,
            self._step,
            self._flags,
            tag.bank,
            tag.exchange,
            tag.micro_batch,
            counts,
            length,
        )

    def _check(self, item: ExpectedMessage, header: FrameHeader, sized: bool) -> None:
        """Reject a frame with unexpected row counts or length. Raises ``PeerLostError``."""
        counts = header.counts[: len(item.parts)]
        length = 0
        for part, count, limit in zip(item.parts, counts, item.counts, strict=True):
            if count > limit or (count != limit and not sized):
                rule = "at most" if sized else "exactly"
                self.reject(item.rank, f"{count} rows in a part, {rule} {limit} expected")
            length += count * part.row_bytes
        if length != header.length or any(header.counts[len(item.parts) :]):
            self.reject(item.rank, f"frame of {header.length} bytes: must be {length}")

    def _tensors(self, item: ExpectedMessage, frame: Frame) -> tuple[Tensor, ...]:
        tensors, first = [], 0
        for part, count in zip(item.parts, frame.header.counts, strict=False):
            size = count * part.width
            if size:
                tensor = torch.frombuffer(frame.payload, dtype=part.dtype, count=size, offset=first)
            else:  # torch.frombuffer does not accept an empty buffer
                tensor = torch.empty(0, dtype=part.dtype)
            first += count * part.row_bytes
            tensors.append(tensor.view(count, part.width).to(self._device))
        return tuple(tensors)


def _memory(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor, which must outlive the result, as bytes.

    This needs fewer calls of torch, which are slow between kernels, than a view by numpy.
    """
    return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr()))
