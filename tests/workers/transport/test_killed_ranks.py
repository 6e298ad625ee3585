"""Worlds of five processes: one is killed in each phase of its work, the others go on."""

from __future__ import annotations

import os
import signal
import threading
from datetime import timedelta
from typing import Literal, NoReturn

import pytest
import torch
from msgspec import structs

from benchmarks.harness.distributed import run_ranks
from benchmarks.harness.mesh import (
    CPU,
    FakeBank,
    decodes,
    local_dispatcher,
    make_bank,
    make_header,
    make_placement,
    make_rows,
)
from cluster.core.errors import GenerationChangedError, PeerLostError
from cluster.core.topology import Generation, Member, Role
from tests.workers.transport.test_processes import join
from workers.dispatch.expert_server import ExpertServer
from workers.dispatch.remote import RemoteDispatcher
from workers.model.layers import Dispatch
from workers.model.torch_private import TCPStore
from workers.requests.step_header import Grants, StepHeader
from workers.transport.collective import CollectiveTransport
from workers.transport.frames import max_data_bytes
from workers.transport.gloo_world import GlooWorld
from workers.transport.handshake import PeerIdentity
from workers.transport.peer_connections import PeerConnections
from workers.transport.transport import Direction, RowMessage, Tag
from workers.transport.world import listen_store

pytestmark = pytest.mark.distributed

Phase = Literal["before building", "building", "between steps", "dispatch", "combine"]
BANKS = (make_bank(0), make_bank(1))
NUM_ROWS = 4
NAMES = ("attention-0", "attention-1", "expert-0", "expert-1", "expert-2")
LIMIT_S = 80.0
"""Longest time for processes to start."""
NEVER_S = 3600.0
"""Limits of the transport: a killed rank is not noticed by them."""


def make_members(ports: list[int]) -> tuple[Member, ...]:
    members = []
    for i, name in enumerate(NAMES):
        role: Role = "attention" if name.startswith("attention") else "expert"
        rank = int(name[-1])
        members.append(
            Member(
                name=name,
                role=role,
                rank=rank,
                device=rank if role == "expert" else -1,
                data_address=f"127.0.0.1:{ports[i]}",
                store_address=f"127.0.0.1:{ports[5 + i]}" if role == "attention" else "",
            )
        )
    return tuple(members)


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("SIGKILL is not handled")


class Rank:
    """One process: a data plane, and its side of the exchanges."""

    def __init__(self, index: int, ports: list[int], control_port: int) -> None:
        members = make_members(ports)
        self.me = me = members[index]
        self._index, self._ports, self._control_port = index, ports, control_port
        self._placement = make_placement(BANKS, 3, spare=8)
        self.connections = PeerConnections(
            PeerIdentity(
                name=me.name, role=me.role, rank=me.rank, checkpoint_id="c", config_hash="c"
            ),
            "token",
            max_data_bytes=max_data_bytes(BANKS, NUM_ROWS, 4, "sum"),
            port=ports[index],
            step_timeout_s=NEVER_S,
            connect_timeout_s=NEVER_S,
        )
        self.transport = CollectiveTransport(
            self.connections,
            backend="gloo",
            device=CPU,
            store_port=ports[5 + index],
            connect_timeout_s=NEVER_S,
        )

    def control(self) -> TCPStore:
        """A connection to what stands for the controller."""
        limit = timedelta(seconds=2 * LIMIT_S)
        return TCPStore("127.0.0.1", self._control_port, is_master=False, timeout=limit)

    def follow(self) -> None:
        """As soon as any rank has reported a loss, all take the second generation."""
        self.control().wait(["generation-2"])
        self.connections.interrupt(2)

    def enter(self, generation: Generation, *, dies: bool = False) -> None:
        """What a worker does on NewGeneration."""
        self.generation = generation
        join(self.connections, generation)
        if dies:
            die()
        self.transport.apply_generation(generation)
        lost = {0, 1, 2} - {m.device for m in generation.experts}
        placement = self._placement.without_devices(frozenset(lost), epoch=1)
        assert placement is not None
        if self.me.role == "attention":
            self._dispatcher = RemoteDispatcher(
                self.transport,
                BANKS,
                rank=self.me.rank,
                combine_mode="sum",
                dtype=torch.float32,
                device=CPU,
            )
            self._dispatcher.set_placement(placement, generation)
            return
        slots = [p.physical_to_logical[self.me.device] for p in placement.banks]
        self._server = ExpertServer(
            self.transport,
            [FakeBank(b, s) for b, s in zip(BANKS, slots, strict=True)],
            BANKS,
            device_index=self.me.device,
            combine_mode="sum",
            dtype=torch.float32,
            device=CPU,
        )
        self._server.set_placement(placement, generation)

    def run_step(self, step: int) -> None:
        header = make_header((NUM_ROWS,) * 2, step=step, generation=self.generation.number)
        ranks = {m.rank for m in self.generation.attention}
        grants = Grants.of({rank: grant for rank, grant in header.grants if rank in ranks})
        header = structs.replace(header, grants=grants)
        if self.me.role == "attention":
            self._run_home(header)
        else:
            self._server.run_step(header)

    def _run_home(self, header: StepHeader) -> None:
        reference = local_dispatcher(BANKS)
        self._dispatcher.begin_step(header, [decodes(NUM_ROWS)])
        for bank in BANKS:
            sent = Dispatch(bank.index, 0, *make_rows(bank, NUM_ROWS, header.step))
            got = self._dispatcher.combine(self._dispatcher.dispatch(sent))
            torch.testing.assert_close(got, reference.combine(reference.dispatch(sent)))

    def die_while_sending(self, direction: Direction) -> None:
        """When some of the messages of the last bank have been sent."""
        post = self.transport.post

        def send_one_and_die(tag: Tag, messages: list[RowMessage], *, sized: bool) -> None:
            is_last = tag.bank == BANKS[-1].index and tag.direction == direction
            post(tag, messages[:1] if is_last else messages, sized=sized)
            if is_last:
                die()

        self.transport.post = send_one_and_die  # type: ignore[method-assign,assignment]


def live(
    index: int, size: int, ports: list[int], phase: Phase, victim: str, control_port: int
) -> str:
    """One rank; returns the peer that it has lost, or nothing if it was told of a loss."""
    rank = Rank(index, ports, control_port)
    dies = rank.me.name == victim
    members = make_members(ports)
    threading.Thread(target=rank.follow, daemon=True).start()
    if dies and phase == "building":
        GlooWorld._open_connections = lambda world: die()  # type: ignore[method-assign,assignment]
    lost = ""
    try:
        rank.enter(Generation(number=1, members=members), dies=dies and phase == "before building")
        rank.run_step(1)
        if dies and phase == "between steps":
            die()
        if dies:
            rank.die_while_sending("rows" if phase == "dispatch" else "outputs")
        rank.run_step(2)
        rank.run_step(3)  # without the victim
        raise AssertionError("nobody was missed")
    except GenerationChangedError:
        pass
    except PeerLostError as err:
        lost = err.peer
        rank.control().set("generation-2", "announced")
    survivors = tuple(m for m in members if m.name != victim)
    rank.enter(Generation(number=2, members=survivors))
    for step in (4, 5):
        rank.run_step(step)
    control = rank.control()
    if control.add("finished", 1) == len(survivors):
        control.set("all have finished", "")
    control.wait(["all have finished"])  # a rank that ends early would be another lost peer
    return lost


@pytest.mark.parametrize(
    ("phase", "victim"),
    [
        # The store of the first world is lost, too.
        pytest.param("before building", "attention-0", marks=pytest.mark.slow),
        pytest.param("building", "expert-1", marks=pytest.mark.slow),
        ("between steps", "expert-2"),
        pytest.param("dispatch", "attention-0", marks=pytest.mark.slow),
        pytest.param("combine", "expert-1", marks=pytest.mark.slow),
    ],
)
def test_the_others_notice_a_killed_rank_and_go_on(phase: Phase, victim: str) -> None:
    control = listen_store("127.0.0.1", 0, LIMIT_S)
    index = NAMES.index(victim)
    lost = run_ranks(
        *(5, live, phase, victim, control.port),
        timeout_s=3 * LIMIT_S,
        may_die=frozenset({index}),
    )
    assert lost[index] is None
    neighbours = [0, 1] if victim.startswith("expert") else [1, 2, 3, 4]
    named = {lost[i] for i in neighbours}
    assert victim in named
    assert named <= {victim, ""}, "a rank that was told of the loss by another names nobody"
