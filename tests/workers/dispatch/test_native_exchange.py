"""Exchanges by native code: what they count, and that Python goes on where they stop."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from ctypes import addressof, byref, c_int64
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks.harness.mesh import (
    Mesh,
    Worker,
    decodes,
    make_bank,
    make_header,
    make_rows,
)
from cluster.config.cluster import CombineMode
from cluster.core.errors import GenerationChangedError, PeerLostError
from tests.workers.dispatch.compiled import BANKS, compiled
from tests.workers.dispatch.test_dispatch import MODES, Work
from tests.workers.native.builds import NAMES, team
from workers.dispatch import native_attention_side, native_expert_side
from workers.dispatch.expert_server import ExpertServer
from workers.dispatch.local import LocalDispatcher
from workers.dispatch.remote import RemoteDispatcher
from workers.metrics.step_metrics import SAMPLE_INTERVAL
from workers.metrics.step_timer import StepTimer
from workers.model.config import BankSpec, ExchangeSpec
from workers.model.layers import Dispatch
from workers.native.frames import FrameFields, PlaceFields, StepFields
from workers.requests.step_header import StepHeader
from workers.transport import peer_connections
from workers.transport.direct import DirectEdges
from workers.transport.frames import FrameHeader, FrameKind

DTYPE = torch.bfloat16
ROWS = (5, 3)
LIMIT_S = 60.0
FIRST = Work(BANKS, ROWS[:1], make_header(ROWS[:1]), DTYPE)
NUM_EXCHANGES = sum(len(bank.exchanges) for bank in BANKS)


class Calls:
    """What native code did, by both sides of a mesh."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gathered = self.served = self.unsent = 0
        self.stops = 0
        """Gathers and exchanges that were left to Python."""
        self.has_stopped = threading.Event()
        attention = native_attention_side.NativeExchange
        gather, serve = attention.receive_outputs, native_expert_side.NativeServing.serve_natively

        def spy_gather(
            home: native_attention_side.NativeExchange, rows: native_attention_side.NativeRows
        ) -> Tensor | None:
            outputs = gather(home, rows)
            self.gathered += outputs is not None
            self._stop(outputs is None)
            return outputs

        def spy_serve(server: native_expert_side.NativeServing, first: int) -> int:
            after = serve(server, first)
            self.served += after - first
            self._stop(after < len(server.fields))
            return after

        keep_unsent = DirectEdges.keep_unsent

        def spy_keep(edges: DirectEdges) -> None:
            self.unsent += 1
            keep_unsent(edges)

        monkeypatch.setattr(DirectEdges, "keep_unsent", spy_keep)
        monkeypatch.setattr(attention, "receive_outputs", spy_gather)
        monkeypatch.setattr(native_expert_side.NativeServing, "serve_natively", spy_serve)

    def _stop(self, has_stopped: bool) -> None:
        self.stops += has_stopped
        if has_stopped:
            self.has_stopped.set()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Native code waits for as long as a test does."""
    monkeypatch.setattr(peer_connections, "LOOK_S", LIMIT_S)
    return Calls(monkeypatch)


@contextmanager
def native_mesh(
    attention: int,
    experts: int,
    mode: CombineMode = "sum",
    *,
    is_native: bool = True,
    banks: Sequence[BankSpec] = BANKS,
) -> Iterator[Mesh]:
    """Workers with compiled experts; ``is_native`` False: attention without native code."""
    with Mesh(
        attention,
        experts,
        banks,
        mode,
        dtype=DTYPE,
        make_slots=lambda bank, held: compiled(bank, held, DTYPE),
        team=team(NAMES[0]) if is_native else None,
        step_timeout_s=LIMIT_S,
    ) as mesh:
        yield mesh


def sides(mesh: Mesh) -> tuple[RemoteDispatcher, ExpertServer]:
    """Those of the first workers."""
    dispatcher, server = mesh["attention-0"].dispatcher, mesh["expert-0"].server
    assert isinstance(dispatcher, RemoteDispatcher)
    assert server is not None
    return dispatcher, server


def expected(work: Work, rank: int) -> list[Tensor]:
    slots = [compiled(bank, range(bank.num_experts), DTYPE) for bank in work.banks]
    return work(rank, LocalDispatcher(slots, work.banks))


def run_step_ok(mesh: Mesh, step: int, rows: tuple[int, ...] = ROWS) -> None:
    """A step that has the outputs of the local reference; those of several sums nearly."""
    header = make_header(rows, step=step, generation=mesh.generation.number)
    work = Work(mesh.banks, rows, header, DTYPE)
    for rank, results in enumerate(mesh.step(header, work)):
        for mine, reference in zip(results, expected(work, rank), strict=True):
            torch.testing.assert_close(mine, reference)


def dispatch_first(dispatcher: RemoteDispatcher, header: StepHeader) -> None:
    """The first dispatch of a step whose outputs nobody takes."""
    rows, ids, weights = make_rows(BANKS[0], ROWS[0], 1, DTYPE)
    dispatcher.begin_step(header, [decodes(ROWS[0])])
    dispatcher.dispatch(Dispatch(0, 0, rows, ids, weights))


def start_home(mesh: Mesh, step: int, rows: tuple[int, ...] = ROWS[:1]) -> Future[list[Tensor]]:
    """Attention rank 0 runs a step that no expert serves yet."""
    dispatcher, _ = sides(mesh)
    work = Work(BANKS, rows, make_header(rows, step=step), DTYPE)
    return mesh.pool.submit(work, 0, dispatcher)


def test_headers_are_those_of_python() -> None:
    """Every field, at its largest."""
    here, there = socket.socketpair()
    header = FrameHeader(
        FrameKind.ROWS,
        generation=2**32 - 2,
        step=2**63 - 2,
        flags=3,
        bank=2**16 - 2,
        exchange=254,
        micro_batch=1,
        counts=(2**32 - 2, 1),
    )
    frame = FrameFields(socket=here.fileno(), counts=header.counts)
    step = StepFields(header.generation, header.step, header.flags)
    place = PlaceFields(addressof(step), header.bank, header.exchange, header.micro_batch)
    send = team(NAMES[0]).library.functions.frames_send
    with here, there:
        assert send(byref(frame), c_int64(1), int(header.kind), byref(place)) == 1
        assert there.recv(100) == header.encode()
    assert frame.unsent() == b""


@pytest.mark.parametrize("mode", MODES)
def test_steps_are_native_and_counted_as_those_of_python(mode: CombineMode, calls: Calls) -> None:
    """Bytes, pairs of each slot, padding, laps."""
    found = []
    for is_native in (True, False):
        with native_mesh(2, 2, mode, is_native=is_native) as mesh:
            _, server = sides(mesh)
            if not is_native:
                for worker in mesh.workers.values():
                    worker.transport.direct = lambda ranks: None  # type: ignore[method-assign]
            laps: list[str] = []
            server.timer = StepTimer(Laps(laps))
            run_step_ok(mesh, SAMPLE_INTERVAL - 1)
            run_step_ok(mesh, SAMPLE_INTERVAL)
            counts = [c.tolist() for c in server.counters.token_counts]
            stats = server.stats()
            assert stats.pop("expert_worker_slot_seconds_total") > 0.0
            found.append((server.counters.num_bytes, stats, counts, laps))
        assert (calls.gathered, calls.served) == (4 * NUM_EXCHANGES, 4 * NUM_EXCHANGES)
    assert found[0] == found[1]
    assert found[0][3] == ["receive", "experts", "send"] * 2 * NUM_EXCHANGES


class Laps:
    """A sink of the names of laps."""

    def __init__(self, names: list[str]) -> None:
        self.add = lambda name, start_ns, end_ns, place: names.append(name)
        self._last = 0

    def fork(self) -> Laps:
        return self

    def begin_step(self, header: StepHeader) -> bool:
        return True

    def flush(self) -> None: ...


def test_what_an_abandoned_step_left_is_passed_over(calls: Calls) -> None:
    """Rows at the experts, then outputs at home, that belong to an earlier step."""
    with native_mesh(1, 1) as mesh:
        dispatcher, server = sides(mesh)
        dispatch_first(dispatcher, make_header(ROWS[:1], step=1))
        run_step_ok(mesh, 2, ROWS[:1])
        assert (calls.stops, calls.served) == (1, NUM_EXCHANGES - 1)
        header = make_header(ROWS[:1], step=3)
        dispatch_first(dispatcher, header)
        server.begin_step(header)
        server.serve(0, 0)
        run_step_ok(mesh, 4, ROWS[:1])
        assert (calls.stops, calls.gathered) == (2, 2 * NUM_EXCHANGES - 1)


def test_python_waits_where_native_code_does_not(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For outputs at home, then for rows at the experts."""
    monkeypatch.setattr(peer_connections, "LOOK_S", 0.0)
    with native_mesh(1, 1) as mesh:
        _, server = sides(mesh)
        home = start_home(mesh, 1)
        assert calls.has_stopped.wait(LIMIT_S)
        mesh.pool.submit(server.run_step, make_header(ROWS[:1], step=1)).result(LIMIT_S)
        results = [home.result(LIMIT_S)]
        calls.has_stopped.clear()
        serving = mesh.pool.submit(server.run_step, make_header(ROWS[:1], step=2))
        assert calls.has_stopped.wait(LIMIT_S)
        results.append(start_home(mesh, 2).result(LIMIT_S))
        serving.result(LIMIT_S)
    for mine in results:
        for tensor, reference in zip(mine, expected(FIRST, 0), strict=True):
            torch.testing.assert_close(tensor, reference)


def flush_after_steps(worker: Worker) -> None:
    """As a data thread does, which waits for the next step."""
    server, connections = worker.server, worker.connections
    assert server is not None
    run_step = server.run_step

    def run(header: StepHeader) -> None:
        run_step(header)
        edges = connections.edges.values()
        connections.wait(lambda: not any(edge.out_bytes for edge in edges), list)

    server.run_step = run  # type: ignore[method-assign]


@pytest.mark.parametrize("mode", MODES)
def test_frames_that_come_and_go_in_pieces(mode: CombineMode, calls: Calls) -> None:
    """Frames are larger than what the kernel takes at once."""
    rows, spec = (200, 190), ExchangeSpec(index=0, name="mlp", in_width=4096, out_width=4096)
    banks = [replace(make_bank(i), exchanges=(replace(spec, expert_width=8),)) for i in (0, 1)]
    with native_mesh(2, 2, mode, banks=banks) as mesh:
        for worker in mesh.workers.values():
            for edge in worker.connections.edges.values():
                edge.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
            if worker.server is not None:
                flush_after_steps(worker)
        for step in range(1, 4):
            run_step_ok(mesh, step, rows)
    assert calls.unsent


def test_a_peer_that_dies_in_mid_step_is_noticed_at_once() -> None:
    with native_mesh(1, 2) as mesh:
        run_step_ok(mesh, 1, ROWS[:1])
        running = start_home(mesh, 2)
        for edge in list(mesh["expert-1"].connections.edges.values()):
            edge.sock.shutdown(socket.SHUT_RDWR)
        with pytest.raises(PeerLostError, match=r"expert-1: (closed by the peer|cannot send)"):
            running.result(LIMIT_S)


def test_a_peer_that_dies_between_two_exchanges_of_a_call_is_noticed() -> None:
    """The expert worker has served an exchange in the same native call."""
    with native_mesh(1, 1) as mesh:
        dispatcher, server = sides(mesh)
        header = make_header(ROWS[:1])
        dispatch_first(dispatcher, header)
        (edge,) = mesh["attention-0"].connections.edges.values()
        edge.sock.shutdown(socket.SHUT_WR)
        with pytest.raises(PeerLostError, match="attention-0: closed by the peer"):
            server.run_step(header)


def test_a_wake_up_ends_no_native_wait(calls: Calls) -> None:
    """It is for the time after the step, and is not lost."""
    with native_mesh(1, 1) as mesh:
        connections, (_, server) = mesh["attention-0"].connections, sides(mesh)
        running = start_home(mesh, 1)
        for _ in range(100):
            connections.wake()
        server.run_step(make_header(ROWS[:1], step=1))
        for mine, reference in zip(running.result(LIMIT_S), expected(FIRST, 0), strict=True):
            torch.testing.assert_close(mine, reference)
        assert calls.stops == 0
        assert connections.take_wake()


def test_an_interrupt_ends_native_waits() -> None:
    with native_mesh(1, 2) as mesh:
        run_step_ok(mesh, 1, ROWS[:1])
        running = start_home(mesh, 2)
        _, server = sides(mesh)
        serving = mesh.pool.submit(server.run_step, make_header(ROWS[:1], step=3))
        mesh["attention-0"].connections.interrupt(2)
        mesh["expert-0"].connections.interrupt(2)
        for waiting in (running, serving):
            with pytest.raises(GenerationChangedError):
                waiting.result(LIMIT_S)


@pytest.mark.parametrize("slot", [-2, 8, 2**31 - 1])
def test_a_slot_without_an_expert_is_blamed_on_its_sender(slot: int, calls: Calls) -> None:
    with native_mesh(1, 1) as mesh:
        dispatcher, server = sides(mesh)
        tables = dispatcher._maps._built[0][-1]
        lie = replace(tables, decode_slots=torch.full_like(tables.decode_slots, slot))
        header = make_header(ROWS[:1])
        rows, ids, weights = make_rows(BANKS[0], ROWS[0], 1, DTYPE)
        dispatcher.begin_step(header, [decodes(ROWS[0])])
        dispatcher._maps._decode_slots = [lie.decode_slots]
        dispatcher.dispatch(Dispatch(0, 0, rows, ids, weights))
        with pytest.raises(PeerLostError, match=f"no expert in slot {slot} of bank 0") as caught:
            server.run_step(header)
        assert caught.value.peer == "attention-0"
        assert calls.stops == 1


def test_rows_fewer_than_granted_are_left_to_python(calls: Calls) -> None:
    """A request ended between the proposal and the header."""
    header = make_header((ROWS[0] + 2,))

    def home(rank: int, dispatcher: object) -> list[Tensor]:
        assert isinstance(dispatcher, RemoteDispatcher | LocalDispatcher)
        dispatcher.begin_step(header, [decodes(ROWS[0])])
        results = []
        for bank in BANKS:
            rows, ids, weights = make_rows(bank, ROWS[0], 1, DTYPE)
            for exchange in bank.exchanges:
                sent = Dispatch(bank.index, exchange.index, rows, ids, weights)
                rows = dispatcher.combine(dispatcher.dispatch(sent))
                results.append(rows)
        return results

    with native_mesh(1, 2) as mesh:
        slots = [compiled(bank, range(bank.num_experts), DTYPE) for bank in BANKS]
        reference = home(0, LocalDispatcher(slots, BANKS))
        for mine, other in zip(mesh.step(header, home)[0], reference, strict=True):
            torch.testing.assert_close(mine, other)
    assert (calls.gathered, calls.served) == (0, 2 * NUM_EXCHANGES)
