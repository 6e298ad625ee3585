"""A step on a GPU as CUDA graphs, with what the host does between them.

Kernels of one graph cost the host one launch. A step that exchanges rows with other workers is
several graphs, its pieces: messages go between them, in the order of the stream, so that the host
waits for none of them.

Source: "Getting started with CUDA graphs" (NVIDIA, 2019); pieces as in vLLM, which cuts at
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
"""Captured steps of one kind at once."""
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
        stream = _capture_stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            self._begin()
            try:
                yield
            except BaseException:
                with contextlib.suppress(RuntimeError):  # the capture has failed, most likely
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


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: torch shares memory between graphs of one stream only."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class _Kept(NamedTuple, Generic[Captured]):
    step: Captured
    num_rows: int


class KeptSteps(Generic[Captured]):
    """Captured steps of one kind, by what they depend on; those not used for long are dropped."""

    def __init__(self, max_rows: int) -> None:
        """``max_rows`` of all kept steps together, unless a single one has more."""
        self._max_rows = max_rows
        self._state: Hashable = None
        self._kept: dict[Hashable, _Kept[Captured]] = {}
        self._pool: Any = None

    def __len__(self) -> int:
        return len(self._kept)

    def keep_only(self, state: Hashable) -> None:
        """Drop the steps of any other state of what they read and write."""
        if state != self._state:
            self.clear()
            self._state = state

    def clear(self) -> None:
        self._kept.clear()
        self._pool = None  # torch gives no memory to one whose graphs are all gone

    def get(self, key: Hashable, num_rows: int, capture: Callable[[Any], Captured]) -> Captured:
        """The step of a key, captured with a pool of memory where there is none yet.

        It is captured once more if there was no memory for it beside the others.
        """
        found = self._kept.pop(key, None)
        if found is None:
            self._make_room(num_rows)
            try:
                step = capture(self._new_pool())
            except torch.OutOfMemoryError:
                self.clear()
                step = capture(self._new_pool())
            found = _Kept(step, num_rows)
        self._kept[key] = found  # the last used comes last
        return found.step

    def _make_room(self, num_rows: int) -> None:
        total = num_rows + sum(kept.num_rows for kept in self._kept.values())
        while self._kept and (total > self._max_rows or len(self._kept) >= MAX_KEPT):
            total -= self._kept.pop(next(iter(self._kept))).num_rows

    def _new_pool(self) -> Any:
        if self._pool is None or not self._kept:
            torch.cuda.empty_cache()  # no memory that is free elsewhere can be used in a capture
            self._pool = torch.cuda.graph_pool_handle()
        return self._pool
