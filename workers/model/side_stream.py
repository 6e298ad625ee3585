"""CUDA work of threads beside the one that runs steps, on a stream of its own.

A thread's work would otherwise go to the default stream, which is that of the steps: it would wait
for the step under way, hold up the next one, and break the capture of a graph. Work on a side
stream is ordered against steps explicitly: ``follow`` puts it behind all that steps have been given
so far, and ``work`` returns when it is done, so that later steps are behind it. On CPUs all of this
does nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor


class SideStream:
    """One stream for any number of threads. A thread that works waits for the others' work, too."""

    def __init__(self, device: torch.device) -> None:
        """Made by the thread that runs steps, whose stream of this moment is that of the steps."""
        self._device = device
        self._steps: torch.cuda.Stream | None = None
        self._stream: torch.cuda.Stream | None = None
        self._noted: torch.cuda.Event | None = None
        if _has_streams(device):
            self._steps = torch.cuda.current_stream(device)
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def follow(self) -> None:
        """Later work here comes after all that the steps' stream has been given (any thread)."""
        if self._stream is not None and self._steps is not None:
            self._stream.wait_stream(self._steps)

    def note_steps(self) -> None:
        """Remember what steps have been given so far; the host knows that it is nearly done."""
        if self._steps is not None:
            self._noted = self._steps.record_event()

    def follow_noted(self) -> None:
        """``follow`` up to the last ``note_steps``, whatever the step under way waits for."""
        if self._stream is not None and self._noted is not None:
            self._stream.wait_event(self._noted)

    def work(self) -> AbstractContextManager[None]:
        """What the block gives to the device is done when it is left (any thread)."""
        return nullcontext() if self._stream is None else _on(self._stream)

    def to_device(self, data: Tensor) -> Tensor:
        """Data of the CPU, through pinned memory; within ``work``."""
        return data if self._stream is None else _pinned(data).to(self._device, non_blocking=True)

    def to_host(self, data: Tensor) -> Tensor:
        """Data in CPU memory, complete when ``work`` is left."""
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
    """A copy in pinned memory, which torch keeps for the next one of this size."""
    return torch.empty(data.shape, dtype=data.dtype, pin_memory=True).copy_(data, non_blocking=True)
