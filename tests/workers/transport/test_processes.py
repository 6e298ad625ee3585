"""The data plane between real processes, one of which is killed."""

from __future__ import annotations

import os
import signal
import socket
import time

import pytest
import torch

from benchmarks.harness.distributed import RankError, run_ranks
from benchmarks.harness.mesh import (
    CPU,
    FakeBank,
    decodes,
    local_dispatcher,
    make_bank,
    make_placement,
    make_rows,
)
from cluster.core.addresses import split_address
from cluster.core.errors import PeerLostError
from cluster.core.topology import Generation, Member
from tests.harness.tiers import quick_rows
from workers.dispatch.expert_server import ExpertServer
from workers.dispatch.remote import RemoteDispatcher
from workers.engine.micro_batches import MicroBatchRule
from workers.engine.prefill_cap import PrefillCap
from workers.engine.step_channel import StepChannel
from workers.engine.step_leader import StepLeader
from workers.model.layers import Dispatch
from workers.scheduling.step_plan import RowsWanted
from workers.transport.collective import CollectiveTransport
from workers.transport.frames import max_data_bytes
from workers.transport.handshake import PeerIdentity
from workers.transport.peer_connections import PeerConnections
from workers.transport.sockets import SocketTransport

pytestmark = pytest.mark.distributed

BANKS = (make_bank(0), make_bank(1))
NUM_ROWS = 6
NUM_STEPS = 5
LIMIT_S = 80.0
"""Of a wait for a peer: longer than processes take to start, and to notice a death."""


def make_member(index: int, ports: list[int]) -> Member:
    """Rank 0 is the attention worker, the others are expert workers."""
    is_home = index == 0
    return Member(
        name="attention-0" if is_home else f"expert-{index - 1}",
        role="attention" if is_home else "expert",
        rank=0 if is_home else index - 1,
        device=index - 1,
        data_address=f"127.0.0.1:{ports[index]}",
        store_address=f"127.0.0.1:{ports[-1]}" if is_home else "",
    )


def join(connections: PeerConnections, generation: Generation) -> None:
    """Processes start at different times; a second try would close the edges of the first."""
    deadline = time.monotonic() + LIMIT_S
    for member in generation.members:
        while not listens(member.data_address):
            assert time.monotonic() < deadline, f"{member.name} does not listen"
            time.sleep(0.05)
    connections.apply_generation(generation)


def listens(address: str) -> bool:
    host, port = split_address(address)
    try:
        socket.create_connection((host, port)).close()
    except ConnectionRefusedError:
        return False
    return True


def work(rank: int, size: int, ports: list[int], transport_name: str, dies: bool) -> float:
    """One rank; returns the seconds from a peer's death to its notice (home rank)."""
    members = tuple(make_member(i, ports) for i in range(size))
    me = members[rank]
    identity = PeerIdentity(
        name=me.name, role=me.role, rank=me.rank, checkpoint_id="c", config_hash="c"
    )
    limit = max_data_bytes(BANKS, NUM_ROWS, 4, "sum")
    connections = PeerConnections(
        identity, "token", max_data_bytes=limit, port=ports[rank], step_timeout_s=LIMIT_S
    )
    transport: SocketTransport | CollectiveTransport
    if transport_name == "sockets":
        transport = SocketTransport(connections, combine_mode="sum", device=CPU)
    else:
        transport = CollectiveTransport(
            connections, backend="gloo", device=CPU, store_port=ports[-1]
        )
    generation = Generation(number=1, members=members)
    join(connections, generation)
    transport.apply_generation(generation)
    leader = StepLeader(prefill_cap=PrefillCap(max_rows=64), micro_batches=MicroBatchRule())
    channel = StepChannel(connections, leader)
    channel.start_generation(1, epoch=1)
    run = run_home if me.role == "attention" else run_expert
    return run(connections, transport, channel, generation, me, dies)


def run_home(
    connections: PeerConnections,
    transport: SocketTransport | CollectiveTransport,
    channel: StepChannel,
    generation: Generation,
    me: Member,
    dies: bool,
) -> float:
    dispatcher = RemoteDispatcher(
        transport, BANKS, rank=0, combine_mode="sum", dtype=torch.float32, device=CPU
    )
    dispatcher.set_placement(make_placement(BANKS, len(generation.experts)), generation)
    reference = local_dispatcher(BANKS)
    start = 0.0
    try:
        while channel.highest_step < NUM_STEPS:
            start = time.monotonic()
            channel.propose(RowsWanted(NUM_ROWS, 0))
            header = channel.wait(LIMIT_S)
            assert header is not None
            dispatcher.begin_step(header, [decodes(NUM_ROWS)])
            for bank in BANKS:
                sent = Dispatch(bank.index, 0, *make_rows(bank, NUM_ROWS, header.step))
                got = dispatcher.combine(dispatcher.dispatch(sent))
                expected = reference.combine(reference.dispatch(sent))
                torch.testing.assert_close(got, expected)
    except PeerLostError as err:
        if not dies or err.peer != "expert-1":
            raise
        return time.monotonic() - start
    assert not dies
    return 0.0


def run_expert(
    connections: PeerConnections,
    transport: SocketTransport | CollectiveTransport,
    channel: StepChannel,
    generation: Generation,
    me: Member,
    dies: bool,
) -> float:
    placement = make_placement(BANKS, len(generation.experts))
    slots = [p.physical_to_logical[me.device] for p in placement.banks]
    server = ExpertServer(
        transport,
        [FakeBank(b, s) for b, s in zip(BANKS, slots, strict=True)],
        BANKS,
        device_index=me.device,
        combine_mode="sum",
        dtype=torch.float32,
        device=CPU,
    )
    server.set_placement(placement, generation)
    try:
        while (header := channel.wait(LIMIT_S)) is not None:
            if dies and me.rank == 1 and header.step == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            server.run_step(header)
    except PeerLostError:
        return 0.0  # the home rank has finished, or the step died with expert-1
    raise AssertionError("no header")


@pytest.mark.parametrize("transport", quick_rows({"sockets"}, ["sockets", "collective"]))
def test_steps_between_processes(transport: str) -> None:
    run_ranks(3, work, transport, False, timeout_s=3 * LIMIT_S)


@pytest.mark.parametrize("transport", quick_rows({"sockets"}, ["sockets", "collective"]))
def test_a_killed_expert_is_noticed_at_once(transport: str) -> None:
    seconds = run_ranks(3, work, transport, True, timeout_s=3 * LIMIT_S, may_die=frozenset({2}))
    assert seconds[2] is None
    assert seconds[0] < LIMIT_S


def fail(rank: int, size: int, ports: list[int]) -> None:
    if rank == 1:
        raise ValueError("on purpose")
    time.sleep(600)


def kill_self(rank: int, size: int, ports: list[int]) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def sleep(rank: int, size: int, ports: list[int]) -> None:
    time.sleep(600)


@pytest.mark.slow
def test_the_harness_names_the_rank_that_failed() -> None:
    with pytest.raises(RankError, match=r"(?s)rank 1 failed.*on purpose"):
        run_ranks(2, fail)
    with pytest.raises(RankError, match="rank 1 died"):
        run_ranks(2, kill_self)
    with pytest.raises(RankError, match=r"rank 0 did not finish in 3 s"):
        run_ranks(2, sleep, timeout_s=3)
