"""A step on a GPU as CUDA graphs, with what the host does between them.

Kernels of one graph cost the host one launch. A step that exchanges rows with other workers is
several graphs, its pieces: messages go between them, in the order of the stream, so that the host
waits for none of them.

Source: "Getting started with CUDA graphs" (NVIDIA, 2019); pieces as in vLLM, which cuts at
attention.
"""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch

Captured = TypeVar("Captured")
_MAX_KEPT = 64
"""Captured steps at once. Edges and ranks vary with the load: those unused for long are dropped."""
warnings.filterwarnings("ignore", message="The CUDA Graph is empty")  # a piece may be


class StepGraph:
    """What one step gives the device and the host, to be given again by ``replay``.

    Its memory stays taken as long as the object lives.
    """

    def __init__(self, device: torch.device, pool: Any) -> None:
        """``pool`` of memory is shared by all graphs that are replayed one after the other."""
        self._device = device
        self._pool = pool
        self._parts: list[Callable[[], None]] = []
        self._piece: Any = None

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Within it, kernels are captured and do not run."""
        gc.collect()  # a graph that is freed within a capture would break it
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            self._begin()
            try:
                yield
            except BaseException:
                with contextlib.suppress(RuntimeError):  # it was that, most likely
                    self._piece.capture_end()
                raise
            self._end()

    def between(self, act: Callable[[], None]) -> None:
        """While captured: each replay calls this here, between two pieces."""
        self._end()
        self._parts.append(act)
        self._begin()

    def replay(self) -> None:
        """Do the step again. Raises what was raised between two pieces."""
        for part in self._parts:
            part()

    def _begin(self) -> None:
        self._piece = torch.cuda.CUDAGraph()
        # Threads beside this one load experts and lend blocks meanwhile.
        self._piece.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def _end(self) -> None:
        self._piece.capture_end()
        self._parts.append(self._piece.replay)


class KeptSteps(Generic[Captured]):
    """Captured steps of one kind, by what they depend on."""

    def __init__(self) -> None:
        self._state: Hashable = None
        self._kept: dict[Hashable, Captured] = {}
        self._pool: Any = None

    def __len__(self) -> int:
        return len(self._kept)

    def enter(self, state: Hashable) -> None:
        """Drop the steps of any other state of what they read and write."""
        if state != self._state:
            self._kept.clear()
            self._pool = None  # torch gives no memory to one whose graphs are all gone
            self._state = state

    def get(self, key: Hashable, capture: Callable[[Any], Captured]) -> Captured:
        """The step of a key, captured with a pool of memory where there is none yet."""
        found = self._kept.pop(key, None)
        if found is None:
            if len(self._kept) >= _MAX_KEPT:
                del self._kept[next(iter(self._kept))]
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            found = capture(self._pool)
        self._kept[key] = found  # the last used comes last
        return found
