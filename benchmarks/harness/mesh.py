"""A small data plane in one process: every worker a thread, all sockets on loopback."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, TypeVar

import torch
from msgspec.structs import replace
from torch import Tensor

from cluster.config.cluster import CombineMode
from cluster.core.placement import FREE_SLOT, BankShape, ExpertPlacement, contiguous
from cluster.core.topology import Generation, Member, Role, holds_experts
from workers.dispatch.colocated import ColocatedDispatcher, LoopbackTransport
from workers.dispatch.dispatcher import BatchRows, SlotBank, TokenDispatcher
from workers.dispatch.expert_server import ExpertServer
from workers.dispatch.local import LocalDispatcher
from workers.dispatch.remote import RemoteDispatcher
from workers.metrics.activity import Activity
from workers.model.config import BankSpec, ExchangeSpec
from workers.model.weighting import sum_of_pairs
from workers.native.thread_team import ThreadTeam
from workers.requests.step_header import Grant, Grants, StepHeader
from workers.transport.collective import CollectiveTransport
from workers.transport.frames import max_data_bytes
from workers.transport.handshake import PeerIdentity
from workers.transport.peer_connections import PeerConnections
from workers.transport.sockets import SocketTransport
from workers.transport.transport import DataTransport
from workers.transport.world import Backend

TransportName = Literal["sockets", "collective", "nccl"]
"""``nccl`` needs the fixture of ``nccl_over_gloo``."""
T = TypeVar("T")
CPU = torch.device("cpu")
MAX_ROWS = 256
TIMEOUT_S = 120.0


def make_bank(index: int = 0, num_experts: int = 8, top_k: int = 2, width: int = 16) -> BankSpec:
    """A bank like OLMoE's: one exchange, weighted."""
    exchange = ExchangeSpec(index=0, name="mlp", in_width=width, out_width=width)
    return BankSpec(
        index=index,
        bank="mlp",
        layer=index,
        num_experts=num_experts,
        top_k=top_k,
        exchanges=(exchange,),
    )


def make_attention_bank(index: int = 0, num_experts: int = 8, top_k: int = 2) -> BankSpec:
    """A bank like JetMoE's attention: unequal widths, unweighted out, per-slot input back."""
    return BankSpec(
        index=index,
        bank="attention",
        layer=index,
        num_experts=num_experts,
        top_k=top_k,
        exchanges=(
            ExchangeSpec(index=0, name="query", in_width=16, out_width=6, weighted=False),
            ExchangeSpec(index=1, name="output", in_width=6, out_width=16, per_slot_input=True),
        ),
        float32_weights=True,
    )


class FakeBank:
    """Experts that differ by their logical id; an output depends on its own input row alone."""

    version = 0

    def __init__(self, spec: BankSpec, experts: Sequence[int]) -> None:
        self._spec = spec
        self._experts = torch.tensor(experts)

    def native(self, exchange: int) -> None:
        """See ``SlotBank``."""

    def compute(
        self, exchange: int, inputs: Tensor, pair_input: Tensor, pair_slot: Tensor
    ) -> Tensor:
        """Only multiplications and additions: bitwise the same for any batch."""
        experts = self._experts[pair_slot]
        assert int(experts.min()) >= 0, "an empty slot was used"
        width = self._spec.exchanges[exchange].out_width
        rows = inputs[pair_input]
        while rows.shape[1] < width:
            rows = torch.cat((rows, rows * 0.5), dim=1)
        rows = rows[:, :width]
        factor = (experts + 1).to(rows.dtype).unsqueeze(1)
        return rows * rows.abs() * factor + rows - factor

    def compute_rows(
        self, exchange: int, inputs: Tensor, slots: Tensor, weights: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """See ``SlotBank``."""
        return sum_of_pairs(
            partial(self.compute, exchange),
            inputs,
            slots,
            weights.float(),
            per_slot_input=self._spec.exchanges[exchange].per_slot_input,
            float32_weights=self._spec.float32_weights,
            dtype=dtype,
        )


def local_dispatcher(banks: Sequence[BankSpec]) -> LocalDispatcher:
    """The reference: slot e holds expert e."""
    return LocalDispatcher([FakeBank(b, range(b.num_experts)) for b in banks], banks)


def make_placement(banks: Sequence[BankSpec], num_devices: int, spare: int = 0) -> ExpertPlacement:
    """The contiguous placement of these banks."""
    shapes = [BankShape(bank=b.bank, layer=b.layer, num_experts=b.num_experts) for b in banks]
    return contiguous(shapes, num_devices, spare)


def make_header(
    rows: Sequence[int],
    *,
    step: int = 1,
    generation: int = 1,
    exact: bool = False,
    prompts: bool | None = None,
    num_micro_batches: int = 1,
    epoch: int = 1,
) -> StepHeader:
    """Decode rows by attention rank, or prefill rows (``prompts``; None: as ``exact``)."""
    kind = "prefill_rows" if (exact if prompts is None else prompts) else "decode_rows"
    return StepHeader(
        generation=generation,
        step=step,
        epoch=epoch,
        oldest_epoch=epoch,
        grants=Grants.of({rank: Grant(**{kind: n}) for rank, n in enumerate(rows)}),
        num_micro_batches=num_micro_batches,
        exact=exact,
    )


@dataclass
class Worker:
    """One rank and what it is made of."""

    connections: PeerConnections
    transport: SocketTransport | CollectiveTransport
    dispatcher: RemoteDispatcher | ColocatedDispatcher | None = None
    server: ExpertServer | None = None


@dataclass
class Mesh:
    """A + E workers of one generation, or E colocated ones. Use as a context manager."""

    num_attention: int
    num_experts: int
    banks: Sequence[BankSpec]
    combine_mode: CombineMode = "sum"
    transport: TransportName = "sockets"
    dtype: torch.dtype = torch.float32
    placement: ExpertPlacement | None = None
    spare: int = 0
    step_timeout_s: float = 60.0
    colocated: bool = False
    make_slots: Callable[[BankSpec, Sequence[int]], SlotBank] = FakeBank
    """The expert slots of a worker: a bank, and the expert in each slot."""
    team: ThreadTeam | None = None
    """Of the dispatchers."""
    workers: dict[str, Worker] = field(default_factory=dict)
    activities: defaultdict[str, Activity] = field(default_factory=lambda: defaultdict(Activity))
    """Of the data threads, by worker."""
    generation: Generation = field(default_factory=lambda: Generation(number=0, members=()))

    def __enter__(self) -> Mesh:
        if self.placement is None:
            self.placement = make_placement(self.banks, self.num_experts, self.spare)
        pools: dict[Role, int] = {"attention": self.num_attention, "expert": self.num_experts}
        if self.colocated:
            pools = {"colocated": self.num_experts}
        members = [self._start(r, rank) for r, number in pools.items() for rank in range(number)]
        self.pool = ThreadPoolExecutor(len(members))
        self.apply(Generation(number=1, members=tuple(members)))
        return self

    def __exit__(self, *exc: object) -> None:
        for worker in self.workers.values():
            worker.transport.close()
            worker.connections.close()
        self.pool.shutdown()

    def __getitem__(self, name: str) -> Worker:
        return self.workers[name]

    def apply(self, generation: Generation) -> None:
        """All members take the generation, at the same time."""
        self.generation = generation
        self.each({m.name: partial(self.apply_one, m.name) for m in generation.members})

    def apply_one(self, name: str) -> None:
        """What a worker does on NewGeneration."""
        worker, placement = self.workers[name], self.placement
        assert placement is not None
        worker.connections.apply_generation(self.generation)
        worker.transport.apply_generation(self.generation)
        if worker.dispatcher is not None:
            worker.dispatcher.set_placement(placement, self.generation)
        if worker.server is not None:
            worker.server.set_placement(placement, self.generation)

    def each(self, calls: dict[str, Callable[[], T]]) -> dict[str, T]:
        """Run one call per worker, each in its thread; the first failure is raised."""
        futures = {name: self.pool.submit(call) for name, call in calls.items()}
        return {name: future.result(TIMEOUT_S) for name, future in futures.items()}

    def step(self, header: StepHeader, home: Callable[[int, TokenDispatcher], T]) -> list[T]:
        """Experts serve a step while ``home(rank, dispatcher)`` runs; results by attention rank."""

        def attention(member: Member) -> T:
            dispatcher = self.workers[member.name].dispatcher
            assert dispatcher is not None
            return home(member.rank, dispatcher)

        def expert(worker: Worker) -> None:
            assert worker.server is not None
            worker.server.run_step(header)

        served = [
            self.pool.submit(expert, self.workers[m.name])
            for m in self.generation.experts
            if not m.runs_attention
        ]
        homes = [self.pool.submit(attention, m) for m in self.generation.attention]
        results = [future.result(TIMEOUT_S) for future in homes]
        for future in served:
            future.result(TIMEOUT_S)
        return results

    def _start(self, role: Role, rank: int) -> Member:
        name = f"{role}-{rank}"
        connections = make_connections(
            role, rank, self.banks, self.combine_mode, self.step_timeout_s
        )
        transport: SocketTransport | CollectiveTransport
        if self.transport == "sockets":
            transport = SocketTransport(connections, combine_mode=self.combine_mode, device=CPU)
        else:
            backend: Backend = "nccl" if self.transport == "nccl" else "gloo"
            transport = CollectiveTransport(connections, backend=backend, device=CPU)
        worker = self.workers[name] = Worker(connections, transport)
        if role == "attention":
            worker.dispatcher = self._home_side(transport, rank)
        elif role == "expert":
            worker.server = self._expert_side(transport, rank)
        else:
            both = LoopbackTransport(transport, rank)
            server = self._expert_side(both, rank)
            worker.dispatcher = ColocatedDispatcher(both, self._home_side(both, rank), server)
        member = Member(
            name=name,
            role=role,
            rank=rank,
            device=rank if holds_experts(role) else -1,
            data_address=connections.address,
        )
        if isinstance(transport, CollectiveTransport):
            member = replace(member, store_address=transport.rendezvous.store_address)
        return member

    def _home_side(self, transport: DataTransport, rank: int) -> RemoteDispatcher:
        return RemoteDispatcher(
            transport,
            self.banks,
            rank=rank,
            combine_mode=self.combine_mode,
            dtype=self.dtype,
            device=CPU,
            activity=self.activities[f"attention-{rank}"],
            team=self.team,
        )

    def _expert_side(self, transport: DataTransport, rank: int) -> ExpertServer:
        return ExpertServer(
            transport,
            self._slots(rank),
            self.banks,
            device_index=rank,
            combine_mode=self.combine_mode,
            dtype=self.dtype,
            device=CPU,
            activity=self.activities[f"expert-{rank}"],
        )

    def _slots(self, device: int) -> list[SlotBank]:
        assert self.placement is not None
        maps = [b.physical_to_logical[device] for b in self.placement.banks]
        for slots in maps:
            assert all(e >= FREE_SLOT for e in slots)
        return [self.make_slots(b, m) for b, m in zip(self.banks, maps, strict=True)]


def make_connections(
    role: Role,
    rank: int,
    banks: Sequence[BankSpec] = (),
    combine_mode: CombineMode = "sum",
    step_timeout_s: float = 60.0,
    *,
    token: str = "secret",
    checkpoint_id: str = "checkpoint",
    config_hash: str = "config",
    connect_timeout_s: float = 30.0,
    path_limit_s: float = 60.0,
    frame_bytes: int | None = None,
) -> PeerConnections:
    """Peer connections on loopback."""
    limit = max_data_bytes(banks or [make_bank()], MAX_ROWS, 4, combine_mode)
    identity = PeerIdentity(
        name=f"{role}-{rank}",
        role=role,
        rank=rank,
        checkpoint_id=checkpoint_id,
        config_hash=config_hash,
    )
    return PeerConnections(
        identity,
        token,
        max_data_bytes=frame_bytes or limit,
        connect_timeout_s=connect_timeout_s,
        step_timeout_s=step_timeout_s,
        path_limit_s=path_limit_s,
    )


def make_rows(
    spec: BankSpec, num_rows: int, seed: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Random rows [T, width], distinct expert ids [T, k] and weights [T, k]."""
    generator = torch.Generator().manual_seed(seed)
    width = spec.exchanges[0].in_width
    rows = torch.randn(num_rows, width, generator=generator).to(dtype)
    scores = torch.rand(num_rows, spec.num_experts, generator=generator)
    weights, ids = scores.topk(spec.top_k, dim=1)
    return rows, ids, weights


@dataclass(frozen=True, slots=True)
class GivenRows:
    """``BatchRows`` as given."""

    is_prefill: Tensor
    row_key: Tensor
    is_inspected: bool = False


def decodes(num_rows: int) -> BatchRows:
    """Rows that are all decode rows (their keys do not matter)."""
    is_prefill = torch.zeros(num_rows, dtype=torch.bool)
    return GivenRows(is_prefill=is_prefill, row_key=is_prefill.long())


def prefill(num_rows: int, seed: int = 0) -> BatchRows:
    """Rows that are all prefill rows, with random keys."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randint(-(2**62), 2**62, (num_rows,), generator=generator)
    return GivenRows(is_prefill=torch.ones(num_rows, dtype=torch.bool), row_key=keys)
