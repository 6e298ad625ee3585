"""CUDA graphs of a step on a GPU, and the host calls between them.

The host launches all kernels of one graph with one call. If the transport cannot be captured, a
step that exchanges rows with other workers consists of several graphs, its pieces. Between two
pieces, the host enqueues messages on the stream, so it does not wait for any piece.

Source: "Getting started with CUDA graphs" (NVIDIA, 2019); pieces as in vLLM, which splits at
attention.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Generic, NamedTuple, TypeVar

import torch

Captured = TypeVar("Captured")
MAX_KEPT = 32
"""Maximum number of captured steps that a ``StepGraphCache`` keeps."""
warnings.filterwarnings("ignore", message="The CUDA Graph is empty")  # a piece may be


class StepGraph:
    """Recorded work of one step, on device and host, which ``replay`` repeats.

    The memory of the graphs stays allocated as long as the object lives.
    """

    def __init__(self, device: torch.device, pool: Any) -> None:
        """Make an empty recording. ``pool``: memory pool, shared by graphs that never run at the
        same time."""
        self._device = device
        self._pool = pool
        self._before: list[Callable[[], None]] = []
        self._at_end: list[Callable[[], None]] = []
        self._parts: list[Callable[[], None]] = []
        self._pieces: list[Any] = []

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Capture the kernels launched in this context instead of running them."""
        stream = _capture_stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            self._begin()
            try:
                yield
            except BaseException:
                with contextlib.suppress(Exception):  # the capture has most likely failed
                    self._finish()
                raise
            self._finish()

    def between(self, act: Callable[[], None]) -> None:
        """End a graph of the capture and begin the next one. Each replay calls ``act`` between the
        two graphs."""
        self._end()
        self._parts.append(act)
        self._begin()

    def at_end(self, act: Callable[[], None]) -> None:
        """Call ``act`` at the end of the capture, also of one that fails. A capture that fails
        without having joined all streams would leave torch's allocator in a wrong state."""
        self._at_end.append(act)

    def before(self, act: Callable[[], None]) -> None:
        """Let each replay call ``act`` before it launches anything."""
        self._before.append(act)

    def replay(self) -> None:
        """Run the step again. Raises the errors of the host calls before and between graphs."""
        for act in self._before:
            act()
        assert self._parts, "the graphs were dropped"
        for part in self._parts:
            part()

    def drop(self) -> None:
        """Destroy the graphs; ``replay`` must not reach them again.

        CUDA destroys a graph that still runs on the device when it ends.
        """
        self._parts.clear()
        while self._pieces:
            self._pieces.pop().reset()

    def _begin(self) -> None:
        self._pieces.append(torch.cuda.CUDAGraph())
        # Other threads load experts and provide blocks during the capture.
        self._pieces[-1].capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def _finish(self) -> None:
        try:
            while self._at_end:
                self._at_end.pop()()
        finally:
            self._end()

    def _end(self) -> None:
        self._pieces[-1].capture_end()
        self._parts.append(self._pieces[-1].replay)


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of all captures: torch shares memory only between graphs of one stream."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class _Kept(NamedTuple, Generic[Captured]):
    step: Captured
    num_rows: int


class StepGraphCache(Generic[Captured]):
    """Captured steps of one kind, by key. The cache drops the least recently used steps."""

    def __init__(self, max_rows: int) -> None:
        """``max_rows``: maximum number of rows of all kept steps together; a single step may have
        more."""
        self._max_rows = max_rows
        self._state: Hashable = None
        self._kept: dict[Hashable, _Kept[Captured]] = {}
        self._pool: Any = None

    def __len__(self) -> int:
        return len(self._kept)

    def has(self, state: Hashable, key: Hashable) -> bool:
        """Whether a step of a key is kept that uses the tensors which ``state`` identifies."""
        return state == self._state and key in self._kept

    def keep_only(self, state: Hashable) -> None:
        """Drop all captured steps if ``state``, which identifies the tensors that they use, has
        changed."""
        if state != self._state:
            self.clear()
            self._state = state

    def clear(self) -> None:
        self._kept.clear()
        self._pool = None  # torch allocates nothing for a pool whose graphs are deleted

    def get(self, key: Hashable, num_rows: int, capture: Callable[[Any], Captured]) -> Captured:
        """Return the captured step of a key. If there is none, call ``capture`` with a memory pool.

        ``num_rows``: rows of the step. If memory does not suffice, all other steps are dropped and
        the capture is retried.
        """
        found = self._kept.pop(key, None)
        if found is None:
            self._evict_steps(num_rows)
            try:
                step = capture(self._new_pool())
            except torch.OutOfMemoryError:
                self.clear()
                step = capture(self._new_pool())
            found = _Kept(step, num_rows)
        self._kept[key] = found  # the most recently used is last
        return found.step

    def _evict_steps(self, num_rows: int) -> None:
        total = num_rows + sum(kept.num_rows for kept in self._kept.values())
        while self._kept and (total > self._max_rows or len(self._kept) >= MAX_KEPT):
            total -= self._kept.pop(next(iter(self._kept))).num_rows

    def _new_pool(self) -> Any:
        if self._pool is None or not self._kept:
            torch.cuda.empty_cache()  # a capture cannot use memory that is free in other pools
            self._pool = torch.cuda.graph_pool_handle()
        return self._pool
