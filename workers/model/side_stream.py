"""CUDA stream for work of threads other than the step thread.

On the default stream, which runs the steps, such work would wait for the current step, delay the
next one, and break the capture of a graph. The order between side stream and steps is explicit:
after ``follow``, work here waits for all work enqueued on the steps' stream so far. The context
``work`` exits when its work is done, so later steps see its results. On CPUs nothing is done.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor


class SideStream:
    """One stream, shared by any number of threads. A thread also waits for work of the others."""

    def __init__(self, device: torch.device) -> None:
        """Call it on the thread that runs steps: its current CUDA stream is taken as the steps'."""
        self._device = device
        self._steps: torch.cuda.Stream | None = None
        self._stream: torch.cuda.Stream | None = None
        self._noted: torch.cuda.Event | None = None
        if _has_streams(device):
            self._steps = torch.cuda.current_stream(device)
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def follow(self) -> None:
        """Let later work here wait for all work enqueued on the steps' stream (any thread)."""
        if self._stream is not None and self._steps is not None:
            self._stream.wait_stream(self._steps)

    def note_steps(self) -> None:
        """Record the work enqueued for steps so far. Call it when that work is nearly done."""
        if self._steps is not None:
            self._noted = self._steps.record_event()

    def follow_noted(self) -> None:
        """Like ``follow``, but wait only for work before the last ``note_steps``."""
        if self._stream is not None and self._noted is not None:
            self._stream.wait_event(self._noted)

    def work(self) -> AbstractContextManager[None]:
        """Context in which work runs on this stream; on exit the work is done (any thread)."""
        return nullcontext() if self._stream is None else _on(self._stream)

    def to_device(self, data: Tensor) -> Tensor:
        """Copy CPU data to the device through pinned memory; within ``work``."""
        return data if self._stream is None else _pinned(data).to(self._device, non_blocking=True)

    def to_host(self, data: Tensor) -> Tensor:
        """Copy data to CPU memory; the copy is complete when ``work`` exits."""
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
