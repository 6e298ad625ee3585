"""Ranks with small experts that are connected by the workers' data plane."""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from cluster.core.errors import PeerLostError
from cluster.core.placement import BankShape, ExpertPlacement, contiguous
from cluster.core.topology import Generation, Member
from workers.dispatch.expert_server import ExpertServer
from workers.dispatch.remote import RemoteDispatcher
from workers.experts.bank import ExpertBank, make_kernel
from workers.model.config import BankSpec, ExchangeSpec
from workers.native.thread_team import ThreadTeam, start_kernels
from workers.requests.step_header import Grant, Grants, StepHeader
from workers.transport.collective import CollectiveTransport
from workers.transport.frames import max_data_bytes
from workers.transport.handshake import PeerIdentity
from workers.transport.peer_connections import PeerConnections
from workers.transport.sockets import SocketTransport
from workers.transport.transport import DataTransport, ExpectedMessage, PartShape, Tag

CPU = torch.device("cpu")
DTYPE = torch.bfloat16
EXPERT_WIDTH = 16
"""Hidden size of an expert; real experts have hundreds."""
_MEET_LIMIT_S = 60.0
_SECRET = "bench"


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Numbers of ranks, and sizes of an exchange."""

    attention_ranks: int
    expert_ranks: int
    width: int
    """Elements of a row."""
    num_experts: int
    top_k: int
    max_rows: int
    """Most rows of one attention rank in a step."""
    transport: Literal["sockets", "collective"] = "sockets"
    layers: int = 1
    """Number of sequential exchanges in a step."""

    @property
    def size(self) -> int:
        """Ranks; those of attention come first."""
        return self.attention_ranks + self.expert_ranks

    @property
    def banks(self) -> list[BankSpec]:
        """One bank with one exchange for each layer."""
        exchange = ExchangeSpec(
            index=0,
            name="mlp",
            in_width=self.width,
            out_width=self.width,
            expert_width=EXPERT_WIDTH,
        )
        return [
            BankSpec(
                index=layer,
                bank="mlp",
                layer=layer,
                num_experts=self.num_experts,
                top_k=self.top_k,
                exchanges=(exchange,),
            )
            for layer in range(self.layers)
        ]

    @property
    def placement(self) -> ExpertPlacement:
        """Placement of the experts in order, with equal numbers on each expert rank."""
        shapes = [
            BankShape(bank="mlp", layer=layer, num_experts=self.num_experts)
            for layer in range(self.layers)
        ]
        return contiguous(shapes, self.expert_ranks)

    def header(self, step: int, rows: int, is_prefill: bool = False) -> StepHeader:
        """Return the header of a step with equal rows on every attention rank."""
        grant = Grant(prefill_rows=rows) if is_prefill else Grant(decode_rows=rows)
        return StepHeader(
            generation=1,
            step=step,
            epoch=1,
            oldest_epoch=1,
            grants=Grants.of(dict.fromkeys(range(self.attention_ranks), grant)),
            exact=is_prefill,
        )

    def generation(self, ports: Sequence[int]) -> Generation:
        """Return the members on loopback, with two ports for each."""
        members = []
        for i in range(self.size):
            rank = i - self.attention_ranks
            is_attention = rank < 0
            members.append(
                Member(
                    name=f"rank-{i}",
                    role="attention" if is_attention else "expert",
                    rank=i if is_attention else rank,
                    device=-1 if is_attention else rank,
                    data_address=f"127.0.0.1:{ports[i]}",
                    store_address=f"127.0.0.1:{ports[self.size + i]}" if is_attention else "",
                )
            )
        return Generation(number=1, members=tuple(members))


def small_experts(shape: Shape, device: int, team: ThreadTeam | None) -> list[ExpertBank]:
    """Experts that compute little, all that are on one expert rank, by layer."""
    banks = []
    for spec, placed in zip(shape.banks, shape.placement.banks, strict=True):
        held = placed.physical_to_logical[device]
        bank = ExpertBank(spec, len(held), DTYPE, CPU, partial(make_kernel, team=team))
        for slot in range(len(held)):
            for exchange, matrix, size in spec.matrices:
                bank.store(slot, exchange, matrix, torch.ones(size, dtype=DTYPE))
        banks.append(bank)
    return banks


class Meetings:
    """Barriers of the ranks; created before the ranks start."""

    def __init__(self, shape: Shape) -> None:
        context = multiprocessing.get_context("spawn")
        self._listening = context.Barrier(shape.size)
        self._served = context.Barrier(shape.attention_ranks)

    def all_listen(self) -> None:
        """All ranks: no rank opens a connection before all of them listen."""
        self._listening.wait(_MEET_LIMIT_S)

    def all_served(self) -> None:
        """Attention ranks: no rank closes before all of them have their last outputs."""
        self._served.wait(_MEET_LIMIT_S)


class Connected:
    """The transport of one rank, joined with all others for a ``with`` block."""

    def __init__(self, shape: Shape, rank: int, ports: Sequence[int], meetings: Meetings) -> None:
        logging.disable(logging.WARNING)  # peers close at the end
        self.generation = shape.generation(ports)
        me = self.generation.members[rank]
        identity = PeerIdentity(
            name=me.name, role=me.role, rank=me.rank, checkpoint_id="bench", config_hash="bench"
        )
        limit = max_data_bytes(shape.banks, shape.max_rows, 4, "sum")
        self._meetings = meetings
        self._connections = PeerConnections(
            identity, _SECRET, max_data_bytes=limit, port=ports[rank]
        )
        self.transport: DataTransport
        if shape.transport == "sockets":
            self.transport = SocketTransport(self._connections, combine_mode="sum", device=CPU)
        else:
            store_port = ports[shape.size + rank]
            self.transport = CollectiveTransport(
                self._connections, backend="gloo", device=CPU, store_port=store_port
            )

    def __enter__(self) -> Connected:
        self._meetings.all_listen()
        self._connections.apply_generation(self.generation)
        self.transport.apply_generation(self.generation)
        return self

    def __exit__(self, *error: object) -> None:
        self.transport.close()
        self._connections.close()


def idle_server(connected: Connected, device: int, shape: Shape) -> ExpertServer:
    """The server of expert rank ``device``, whose experts compute little."""
    server = ExpertServer(
        connected.transport,
        small_experts(shape, device, start_kernels(1).team),
        shape.banks,
        device_index=device,
        combine_mode="sum",
        dtype=DTYPE,
        device=CPU,
    )
    server.set_placement(shape.placement, connected.generation)
    return server


def remote_dispatcher(connected: Connected, rank: int, shape: Shape) -> RemoteDispatcher:
    """The dispatcher of attention rank ``rank``."""
    dispatcher = RemoteDispatcher(
        connected.transport,
        shape.banks,
        rank=rank,
        combine_mode="sum",
        dtype=DTYPE,
        device=CPU,
        team=start_kernels(1).team,
    )
    dispatcher.set_placement(shape.placement, connected.generation)
    return dispatcher


def wait_for_the_end(transport: DataTransport, shape: Shape, step: int) -> None:
    """The last outputs may still wait to be sent: the other side closes when it has them."""
    expected = [
        ExpectedMessage(rank, (PartShape(1, torch.int32),), (1,))
        for rank in range(shape.attention_ranks)
    ]
    try:
        transport.begin_step(shape.header(step, 1))
        transport.receive(Tag(0, 0, 0, "rows"), expected, sized=False, must_wait=True)
    except PeerLostError:
        return
    raise AssertionError("an attention rank went on")
