"""CUDA stream for work of threads other than the step thread.

On the default stream, which runs the steps, this work would wait for the current step, delay the
next one, and break the capture of a graph. The order between side stream and steps is explicit:
after ``follow``, later work on the side stream waits for all work that was already enqueued on the
steps' stream. The context ``work`` exits when its work is done, so later steps see its results. On
CPUs nothing is done.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor


class SideStream:
    """CUDA stream beside the stream that runs steps. Any number of threads share it; a thread that
    waits for its own work on the stream also waits for earlier work of other threads."""

    def __init__(self, device: torch.device) -> None:
        """Create the stream. Must be called on the thread that runs steps: the current CUDA stream
        of this thread is taken as the stream of the steps."""
        self._device = device
        self._steps: torch.cuda.Stream | None = None
        self._stream: torch.cuda.Stream | None = None
        self._noted: torch.cuda.Event | None = None
        if _has_streams(device):
            self._steps = torch.cuda.current_stream(device)
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def follow(self) -> None:
        """Make later work on the side stream wait for all work enqueued so far on the stream of the
        steps. Any thread may call this."""
        if self._stream is not None and self._steps is not None:
            self._stream.wait_stream(self._steps)

    def note_steps(self) -> None:
        """Record an event on the stream of the steps, for ``follow_noted``; best when the work
        enqueued so far is nearly done."""
        if self._steps is not None:
            self._noted = self._steps.record_event()

    def follow_noted(self) -> None:
        """Make later work on the side stream wait for the steps' work that was enqueued before the
        latest ``note_steps``; no effect if ``note_steps`` was never called."""
        if self._stream is not None and self._noted is not None:
            self._stream.wait_event(self._noted)

    def work(self) -> AbstractContextManager[None]:
        """Return a context in which torch's work runs on the side stream. Its exit waits until this
        work is done. Any thread may use it."""
        return nullcontext() if self._stream is None else _on(self._stream)

    def to_device(self, data: Tensor) -> Tensor:
        """Copy CPU data to the device through pinned memory. Must be called within ``work``."""
        return data if self._stream is None else _pinned(data).to(self._device, non_blocking=True)

    def to_host(self, data: Tensor) -> Tensor:
        """Copy data to pinned CPU memory. Must be called within ``work``; the copy is complete when
        ``work`` exits."""
        return data if self._stream is None else _pinned(data)


def _has_streams(device: torch.device) -> bool:
    return device.type == "cuda"


@contextmanager
def _on(stream: torch.cuda.Stream) -> Iterator[None]:
    with torch.cuda.stream(stream):
        try:
            yield
        finally:
            stream.synchronize()


def _pinned(data: Tensor) -> Tensor:
    """Return a copy in pinned memory, which torch reuses for the next copy of this size."""
    return torch.empty(data.shape, dtype=data.dtype, pin_memory=True).copy_(data, non_blocking=True)
