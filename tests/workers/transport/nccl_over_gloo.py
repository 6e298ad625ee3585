"""What NCCL's process groups do, on CPUs: gloo carries the data.

As NCCL's, a group connects an edge when it is first used, and its transfers block until then, so an
order in which workers wait for each other in a circle shows up.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from workers.model.torch_private import Store, Work, gloo_group
from workers.transport import nccl_world

LIMIT_S = 30.0
"""Longest wait of a group."""
SUCCESS, COMM_ERROR = 0, 2
"""Values of ``torch._C._distributed_c10d.WorkResult``."""


class CoalescedWork:
    """The handle of some transfers."""

    def __init__(self, works: list[Work], holds: bool) -> None:
        self.result = SUCCESS
        self._holds = holds
        self.waited = 0
        self._works = works
        self.done = threading.Event()
        threading.Thread(target=self._finish, daemon=True, name="nccl-stream").start()

    def is_completed(self) -> bool:
        return self.done.is_set()

    def get_future_result(self) -> Any:
        future: Any = torch.futures.Future()
        if self.done.is_set():
            future.set_result(self.result)
        return future

    def wait(self) -> None:
        """What follows finds the data; on a GPU the stream waits here, not the host."""
        self.waited += 1
        if self._holds:
            assert self.done.wait(LIMIT_S), "nothing has come"

    def fail(self) -> None:
        """NCCL has seen an error of the communicator."""
        self.result = COMM_ERROR
        self.done.set()

    def _finish(self) -> None:
        try:
            while self._works:
                self._works.pop(0).wait()
        except RuntimeError:
            self.result = COMM_ERROR
        self.done.set()


class NcclOverGloo:
    """One group, with the signatures of ``torch.distributed.ProcessGroupNCCL``."""

    def __init__(self, nccl: FakeNccl, store: Store, rank: int, size: int) -> None:
        self.aborted = threading.Event()
        self.rank = rank
        self.edges: set[tuple[int, int]] = set()
        """Sender and receiver of connections that this rank has made."""
        self._nccl = nccl
        self._place = (store, rank, size)
        self._started: list[Work] | None = None
        self._is_new = False

    def eager_connect_single_device(self, device: torch.device) -> None:
        self._nccl.connecting(self)
        if self.aborted.is_set():
            raise RuntimeError("NCCL communicator was aborted")
        self._gloo = gloo_group(*self._place, "127.0.0.1", LIMIT_S)

    def send(self, tensors: list[Tensor], dst: int, tag: int) -> None:
        self._add((self.rank, dst), self._gloo.send(tensors, dst, tag))

    def recv(self, tensors: list[Tensor], src: int, tag: int) -> None:
        self._add((src, self.rank), self._gloo.recv(tensors, src, tag))

    def _start_coalescing(self) -> None:
        assert self._started is None
        self._started, self._is_new = [], False

    def _end_coalescing(self) -> CoalescedWork:
        assert self._started is not None
        work, self._started = CoalescedWork(self._started, self._nccl.holds), None
        if self._is_new:
            self._nccl.num_connected += 1
            if not work.done.wait(LIMIT_S):
                raise RuntimeError("no connection")
        self._nccl.works.put(work)
        return work

    def abort(self) -> None:
        self._nccl.aborting(self)
        self.aborted.set()

    def _add(self, edge: tuple[int, int], work: Work) -> None:
        assert self._started is not None, "a transfer outside a group has a communicator of its own"
        self._is_new |= edge not in self.edges
        self.edges.add(edge)
        self._started.append(work)


@dataclass
class FakeNccl:
    """All groups of the process, and what happens in them."""

    groups: list[NcclOverGloo] = field(default_factory=list)
    works: queue.SimpleQueue[CoalescedWork] = field(default_factory=queue.SimpleQueue)
    """Handles, in the order in which the transfers started."""
    holds: bool = True
    """The stream is the host: an order after transfers waits for them."""
    num_connected: int = 0
    """Transfers that had to connect first."""
    making: Callable[[], object] = lambda: None
    connecting: Callable[[NcclOverGloo], object] = lambda group: None
    aborting: Callable[[NcclOverGloo], object] = lambda group: None

    def make(self, store: Store, rank: int, size: int) -> NcclOverGloo:
        """For ``torch_private.nccl_group``."""
        self.making()
        self.groups.append(NcclOverGloo(self, store, rank, size))
        return self.groups[-1]


@pytest.fixture
def nccl(monkeypatch: pytest.MonkeyPatch) -> FakeNccl:
    """Worlds over NCCL run on the CPU from now on."""
    fake = FakeNccl()
    monkeypatch.setattr(nccl_world, "nccl_group", fake.make)
    return fake
