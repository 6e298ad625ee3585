"""Work beside the steps: what it orders on a GPU and on a CPU.

The GPU is the CPU, with streams that write down what is asked of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from queue import Queue
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.harness.engine_stream import TIMEOUT_S
from benchmarks.harness.mesh import make_bank
from cluster.core.frames import ExpertsLoaded, LoadExperts
from cluster.core.placement import FREE_SLOT
from tests.paths import DEMO
from workers.engine.expert_load import LoadCounter, RoutedRows
from workers.experts.kernels_cuda import CudaExperts
from workers.experts.slots import ExpertSlots
from workers.experts.sources import ExpertWeight
from workers.experts.transfer.loading import CHECKPOINT, ExpertLoader, Obstacle, SlotOrder
from workers.kv.block_pool import BlockPool
from workers.kv.cache import KVCache
from workers.kv.transfer.store import KvTransferStore
from workers.model import side_stream
from workers.model.compute_threads import ComputeThreads
from workers.model.config import BankSpec
from workers.model.loading.checkpoint import Checkpoint
from workers.model.side_stream import SideStream
from workers.quantization.matrix import plain

GPU = torch.device("cpu")
BANK = make_bank(0)


@dataclass
class FakeStream:
    """Writes down what is asked of it."""

    name: str
    log: list[str]

    def wait_stream(self, other: FakeStream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def record_event(self) -> str:
        self.log.append(f"{self.name} records an event")
        return f"the event of {self.name}"

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")

    def synchronize(self) -> None:
        self.log.append(f"host waits for {self.name}")


@dataclass
class FakeCuda:
    """``torch.cuda`` of a machine with one GPU: the steps' stream and one more."""

    log: list[str] = field(default_factory=list)
    current: str = "steps"

    def stream_of(self, device: torch.device) -> FakeStream:
        return FakeStream("steps", self.log)

    def new_stream(self, device: torch.device) -> FakeStream:
        return FakeStream("side", self.log)

    @contextmanager
    def use(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream.name
        yield
        self.current = before

    def take(self) -> list[str]:
        """What happened since the last call, repetitions left out."""
        found = [word for i, word in enumerate(self.log) if self.log[i - 1 : i] != [word]]
        self.log.clear()
        return found


class _Logged(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down on which stream the device is given something."""

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cuda = cuda

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(word in str(func) for word in ("copy_", "clone", "stack", "zero_", "index")):
            self._cuda.log.append(f"work on {self._cuda.current}")
        return result


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    """Streams for tensors of the CPU."""
    fake = FakeCuda()
    monkeypatch.setattr(torch.cuda, "current_stream", fake.stream_of)
    monkeypatch.setattr(torch.cuda, "Stream", fake.new_stream)
    monkeypatch.setattr(torch.cuda, "stream", fake.use)
    monkeypatch.setattr(side_stream, "_has_streams", lambda device: True)
    monkeypatch.setattr(side_stream, "_pinned", Tensor.clone)
    with _Logged(fake):
        yield fake


def make_cache(device: torch.device) -> KVCache:
    return KVCache(
        config=Checkpoint(DEMO).config,
        num_blocks=8,
        block_size=4,
        dtype=torch.float32,
        device=device,
        compute_threads=ComputeThreads(),
    )


def test_work_on_a_cpu_is_the_threads_own() -> None:
    side, data = SideStream(torch.device("cpu")), torch.ones(2)
    side.follow()
    with side.work():
        assert side.to_device(data) is data
        assert side.to_host(data) is data


def test_blocks_are_moved_beside_the_steps_and_complete_on_return(cuda: FakeCuda) -> None:
    cache = make_cache(GPU)
    data = torch.arange(prod(cache.block_shape), dtype=cache.dtype).view(cache.block_shape)
    cuda.take()
    cache.write_block(3, data)
    assert cuda.take() == ["work on side", "host waits for side"]
    assert cache.read_block(3).equal(data)
    assert cuda.take() == ["work on side", "host waits for side"]


def test_blocks_change_hands_behind_the_steps_so_far(cuda: FakeCuda) -> None:
    pool = BlockPool(8)
    store = KvTransferStore(pool, make_cache(GPU))
    [block] = pool.allocate(1)
    pool.store(block, b"h", None)
    cuda.take()
    store.acquire([b"h"])
    assert cuda.take() == ["side waits for steps"]
    store.begin([b"h", b"i"], [block], num_spare=0)
    assert cuda.take() == ["side waits for steps"]


def test_experts_are_moved_beside_the_steps(cuda: FakeCuda) -> None:
    exchange = BANK.exchanges[0]
    kernel = CudaExperts(exchange, torch.float32, GPU, SideStream(GPU))
    cuda.take()
    kernel.resize(2)
    assert cuda.take()[-1] == "side waits for steps", "new slots are empty before they are filled"
    weight = torch.rand(exchange.matrix_shapes[0])
    cuda.take()
    kernel.store(1, 0, weight)
    assert cuda.take() == ["work on side", "host waits for side"]
    assert plain(kernel.read(1, 0)).equal(weight)
    assert cuda.take() == ["work on side", "host waits for side"]
    kernel.clear(1)
    assert cuda.take() == ["work on side", "host waits for side"]


def test_slots_are_written_again_behind_the_steps_that_have_read_them(cuda: FakeCuda) -> None:
    slots = ExpertSlots([BANK], 2, torch.float32, GPU)
    answers: Queue[ExpertsLoaded] = Queue()
    loader = ExpertLoader(slots, {CHECKPOINT: BlankSource}, answers.put, obstacle=nothing)
    cuda.take()
    loader.order(LoadExperts(order=1, experts=[[0, 1, FREE_SLOT]], source={}))
    assert answers.get(timeout=TIMEOUT_S).error == ""
    loader.close()
    assert cuda.take() == ["side waits for steps", "host waits for side"]


def nothing(work: Sequence[SlotOrder], epoch: int) -> Obstacle | None:
    """Stands in the way of an order."""
    return None


class BlankSource:
    """Experts that nobody reads."""

    num_bytes = 0

    def __init__(self, source: Mapping[str, Any]) -> None:
        """It has nothing to open."""

    def weights(self, bank: BankSpec, expert: int, dtype: torch.dtype) -> Iterator[ExpertWeight]:
        raise AssertionError("no order reads an expert")

    def close(self) -> None:
        """It has nothing to close."""


def test_load_is_counted_behind_the_steps_and_beside_them(cuda: FakeCuda) -> None:
    side = SideStream(GPU)
    load = LoadCounter([BANK], side)
    cuda.take()
    load.add(1, 0, [[RoutedRows(torch.empty((0, 2), dtype=torch.int64, device=GPU), None, 0)]])
    assert cuda.take() == ["steps records an event"]
    load.flush()  # a step under way may wait for a peer that is lost
    assert cuda.take() == ["side waits for the event of steps", "host waits for side"]


def test_the_load_of_a_late_step_does_not_wait_for_the_next_one(cuda: FakeCuda) -> None:
    load = LoadCounter([BANK], SideStream(GPU))
    cuda.take()
    routed = [[RoutedRows(torch.empty((0, 2), dtype=torch.int64, device=GPU), None, 0)]]
    load.add(1, 0, routed, is_late=True)
    load.flush()
    assert cuda.take() == ["host waits for side"]
