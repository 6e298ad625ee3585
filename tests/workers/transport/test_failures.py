"""Peers that die, freeze or lie in the middle of a step, on both transports."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest
import torch
from msgspec import structs
from torch import Tensor

from benchmarks.harness.mesh import (
    CPU,
    Mesh,
    TransportName,
    decodes,
    local_dispatcher,
    make_bank,
    make_header,
    make_rows,
    prefill,
)
from cluster.core.errors import GenerationChangedError, PeerLostError, TransportError
from cluster.core.topology import Generation
from workers.dispatch.dispatcher import TokenDispatcher
from workers.model.layers import Dispatch
from workers.requests.step_header import StepHeader
from workers.transport.collective import CollectiveTransport
from workers.transport.transport import RowMessage, Tag

BANKS = (make_bank(0), make_bank(1))
TRANSPORTS: tuple[TransportName, ...] = ("sockets", "collective")
NUM_ROWS = 4
LIMIT_S = 120.0
"""Longest wait for anything."""
STEP_LIMIT_S = 60.0
"""Of the workers' own waits, where something else must end them."""


def home(header: StepHeader) -> Callable[[int, TokenDispatcher], list[Tensor]]:
    """A step through all banks."""

    def run(rank: int, dispatcher: TokenDispatcher) -> list[Tensor]:
        batch = prefill(NUM_ROWS) if header.exact else decodes(NUM_ROWS)
        dispatcher.begin_step(header, [batch])
        results = []
        for bank in BANKS:
            sent = Dispatch(bank.index, 0, *make_rows(bank, NUM_ROWS, rank))
            results.append(dispatcher.combine(dispatcher.dispatch(sent)))
        return results

    return run


def start_home(mesh: Mesh, header: StepHeader) -> Future[list[Tensor]]:
    """Attention rank 0 runs a step that no worker serves yet."""
    dispatcher = mesh["attention-0"].dispatcher
    assert dispatcher is not None
    return mesh.pool.submit(home(header), 0, dispatcher)


def run_step_ok(mesh: Mesh, step: int, num_attention: int = 1, generation: int = 1) -> None:
    """The mesh still works."""
    header = make_header((NUM_ROWS,) * num_attention, step=step, generation=generation)
    got = mesh.step(header, home(header))
    reference = local_dispatcher(BANKS)
    for rank, results in enumerate(got):
        expected = home(header)(rank, reference)
        for mine, other in zip(results, expected, strict=True):
            torch.testing.assert_close(mine, other)


def die(mesh: Mesh, name: str) -> None:
    """What the kernel does when a process is killed."""
    for edge in list(mesh[name].connections.edges.values()):
        edge.sock.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_peer_that_dies_in_mid_step_is_noticed_at_once(transport: TransportName) -> None:
    with Mesh(1, 2, BANKS, transport=transport, step_timeout_s=STEP_LIMIT_S) as mesh:
        run_step_ok(mesh, 1)
        running = start_home(mesh, make_header((NUM_ROWS,), step=2))
        time.sleep(0.1)
        die(mesh, "expert-1")
        with pytest.raises(PeerLostError, match="expert-1") as caught:
            running.result(LIMIT_S)
        assert "in time" not in str(caught.value)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_interrupt_leaves_a_blocked_wait_quickly(transport: TransportName) -> None:
    with Mesh(1, 2, BANKS, transport=transport, step_timeout_s=STEP_LIMIT_S) as mesh:
        run_step_ok(mesh, 1)
        running = start_home(mesh, make_header((NUM_ROWS,), step=2))
        server = mesh["expert-0"].server
        assert server is not None
        serving = mesh.pool.submit(server.run_step, make_header((NUM_ROWS,), step=3))
        time.sleep(0.1)
        mesh["attention-0"].connections.interrupt(2)
        mesh["expert-0"].connections.interrupt(2)
        with pytest.raises(GenerationChangedError):
            running.result(LIMIT_S)
        with pytest.raises(TransportError):
            serving.result(LIMIT_S)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_survivors_go_on_in_a_new_generation(transport: TransportName) -> None:
    """An expert freezes in mid-step: the others abandon it and run the step again."""
    with Mesh(2, 3, BANKS, transport=transport, spare=8, step_timeout_s=STEP_LIMIT_S) as mesh:
        run_step_ok(mesh, 1, num_attention=2)
        kept = mesh["attention-0"].connections.edges["expert-0"].sock
        header = make_header((NUM_ROWS, NUM_ROWS), step=2)
        futures: list[Future[Any]] = []
        for rank in (0, 1):
            dispatcher = mesh[f"attention-{rank}"].dispatcher
            assert dispatcher is not None
            futures.append(mesh.pool.submit(home(header), rank, dispatcher))
        for rank in (0, 2):
            server = mesh[f"expert-{rank}"].server
            assert server is not None
            futures.append(mesh.pool.submit(server.run_step, header))
        time.sleep(0.2)
        survivors = [m for m in mesh.generation.members if m.name != "expert-1"]
        for member in survivors:
            mesh[member.name].connections.interrupt(2)
        for future in futures:
            try:
                future.result(LIMIT_S)
            except TransportError:
                continue
        assert mesh.placement is not None
        mesh.placement = mesh.placement.without_devices(frozenset({1}), epoch=1)
        mesh.apply(Generation(number=2, members=tuple(survivors)))
        assert mesh["attention-0"].connections.edges["expert-0"].sock is kept
        run_step_ok(mesh, 3, num_attention=2, generation=2)
        run_step_ok(mesh, 4, num_attention=2, generation=2)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("exact", [False, True])
def test_every_wait_ends_by_its_time_limit(transport: TransportName, exact: bool) -> None:
    with Mesh(1, 2, BANKS, transport=transport, step_timeout_s=0.3) as mesh:
        header = make_header((NUM_ROWS,), exact=exact)
        running = start_home(mesh, header)
        also = r".*\(nor from expert-1\)" if transport == "sockets" else ""
        with pytest.raises(PeerLostError, match="expert-0" + also):
            running.result(LIMIT_S)
    with Mesh(1, 2, BANKS, transport=transport, step_timeout_s=0.3) as mesh:
        server = mesh["expert-1"].server
        assert server is not None
        serving = mesh.pool.submit(server.run_step, header)
        with pytest.raises(PeerLostError, match="attention-0"):
            serving.result(LIMIT_S)


Change = Callable[[RowMessage], RowMessage]


def with_slot(slot: int) -> Change:
    def change(message: RowMessage) -> RowMessage:
        meta = message.parts[0].clone()
        meta[0, 0] = slot
        return replace(message, parts=(meta, message.parts[1]))

    return change


def one_row_less(message: RowMessage) -> RowMessage:
    return replace(message, parts=(message.parts[0], message.parts[1][1:]))


def wider(message: RowMessage) -> RowMessage:
    return replace(message, parts=(message.parts[0], message.parts[1].repeat(1, 2)))


@pytest.mark.parametrize(
    ("change", "exact", "reason"),
    [
        (with_slot(99), False, "no expert in slot 99 of bank 0"),
        (with_slot(-2), True, "no expert in slot -2 of bank 0"),
        (with_slot(4), False, "no expert in slot 4 of bank 0"),  # a free slot
        (one_row_less, False, "rows in a part, exactly 4 expected"),
        (one_row_less, True, "3 input rows: must be 4"),
        (wider, False, "frame of .* bytes: must be"),
    ],
)
def test_nonsense_from_a_peer_closes_its_edge(change: Change, exact: bool, reason: str) -> None:
    banks = (make_bank(num_experts=9, top_k=9),)  # slots of 5 and 4 experts
    with Mesh(1, 2, banks) as mesh:
        header = make_header((4,), exact=exact)
        sender = mesh["attention-0"].transport
        post = sender.post

        def lie(tag: Tag, messages: list[RowMessage], *, sized: bool) -> None:
            post(tag, [change(m) for m in messages], sized=sized)

        sender.post = lie  # type: ignore[method-assign,assignment]

        def send(rank: int, dispatcher: TokenDispatcher) -> None:
            dispatcher.begin_step(header, [prefill(4) if exact else decodes(4)])
            rows, ids, weights = make_rows(banks[0], 4, 0)
            dispatcher.dispatch(Dispatch(0, 0, rows, ids, weights))

        dispatcher, server = mesh["attention-0"].dispatcher, mesh["expert-1"].server
        assert dispatcher is not None
        assert server is not None
        send(0, dispatcher)
        with pytest.raises(PeerLostError, match=reason) as caught:
            server.run_step(header)
        assert caught.value.peer == "attention-0"
        with pytest.raises(PeerLostError, match="expert-1"):
            mesh["attention-0"].connections.wait(lambda: False, list, timeout_s=LIMIT_S)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_worker_without_rows_gets_an_empty_message(
    transport: TransportName, dtype: torch.dtype
) -> None:
    def run(rank: int, dispatcher: TokenDispatcher) -> Tensor:
        dispatcher.begin_step(header, [prefill(NUM_ROWS)])
        rows, ids, weights = make_rows(BANKS[0], NUM_ROWS, rank)
        sent = Dispatch(0, 0, rows.to(dtype), ids % 2, weights)
        return dispatcher.combine(dispatcher.dispatch(sent))

    header = make_header((NUM_ROWS,), exact=True)
    with Mesh(1, 4, BANKS[:1], transport=transport, dtype=dtype) as mesh:
        torch.testing.assert_close(mesh.step(header, run), [run(0, local_dispatcher(BANKS))])


def test_too_many_rows_are_refused() -> None:
    with Mesh(1, 1, BANKS) as mesh:
        dispatcher, server = mesh["attention-0"].dispatcher, mesh["expert-0"].server
        assert dispatcher is not None
        assert server is not None
        dispatcher.begin_step(make_header((8,), exact=True), [prefill(8)])
        rows, ids, weights = make_rows(BANKS[0], 8, 0)
        dispatcher.dispatch(Dispatch(0, 0, rows, ids, weights))
        with pytest.raises(PeerLostError, match="8 rows in a part, at most 4 expected"):
            server.run_step(make_header((4,), exact=True))


def test_a_split_that_differs_from_the_headers_is_refused() -> None:
    with Mesh(1, 1, BANKS) as mesh:
        running = start_home(mesh, make_header((NUM_ROWS,), exact=True))
        server = mesh["expert-0"].server
        assert server is not None
        with pytest.raises(PeerLostError, match=r"flags 1 arrived instead of .* flags 0"):
            server.run_step(make_header((NUM_ROWS,), exact=False))
        with pytest.raises(PeerLostError):
            running.result(LIMIT_S)


def test_a_generation_without_its_members_names_the_loss() -> None:
    """The process group of a generation needs all members: an interrupt ends the wait for it."""
    with Mesh(1, 2, BANKS, transport="collective") as mesh:
        worker = mesh["attention-0"]
        threading.Timer(0.2, worker.connections.interrupt, (3,)).start()
        with pytest.raises(GenerationChangedError):
            worker.transport.apply_generation(structs.replace(mesh.generation, number=2))


def test_a_process_group_that_cannot_be_built_is_a_lost_peer() -> None:
    """Another member died meanwhile; without a better cause the leader is named, whose store it is.

    A ``TransportError`` would end this worker, too.
    """
    with Mesh(1, 1, BANKS, transport="collective") as mesh:
        with socket.create_server(("127.0.0.1", 0)) as closed:
            address = f"127.0.0.1:{closed.getsockname()[1]}"
        members = [structs.replace(m, store_address=address) for m in mesh.generation.members]
        broken = Generation(number=1, members=tuple(members))
        connections = mesh["expert-0"].connections
        transport = CollectiveTransport(
            connections, backend="gloo", device=CPU, connect_timeout_s=0.1
        )
        with pytest.raises(PeerLostError, match="attention-0: no process group generation-1: "):
            transport.apply_generation(broken)
        transport.close()


@pytest.mark.parametrize("sender", ["attention-0", "expert-0"])
def test_a_blocked_send_is_a_wait_for_a_peer(sender: str) -> None:
    """Its worker does not stand still by its own fault."""
    with Mesh(1, 1, BANKS) as mesh:
        waits: list[bool] = []
        transport, activity = mesh[sender].transport, mesh.activities[sender]
        post = transport.post

        def spy(tag: Tag, messages: list[RowMessage], *, sized: bool) -> None:
            waits.append(activity.is_waiting)
            post(tag, messages, sized=sized)

        transport.post = spy  # type: ignore[method-assign,assignment]
        run_step_ok(mesh, 1)
        assert waits == [True] * len(BANKS)
        assert not activity.is_waiting
