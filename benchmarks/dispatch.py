"""Time of one dispatch and combine, by transport: ``python -m benchmarks.dispatch``.

1 attention + 2 expert ranks, a process with one thread each, 64 rows of 2048 bfloat16, top-8 of 64
experts. The experts compute nothing; ``wire`` is the transport alone (rows there, as many rows
back), ``sum`` the whole dispatch and combine with deduplication and the weighted float32 sums.
"""

from __future__ import annotations

import logging
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.results import table
from cluster.errors import PeerLostError
from cluster.placement import BankShape, ExpertPlacement, contiguous
from cluster.topology import Generation, Member
from tests.distributed import run_ranks
from workers.dist.collective import CollectiveTransport
from workers.dist.dispatcher import BatchRows
from workers.dist.expert_server import ExpertServer
from workers.dist.frames import max_data_bytes
from workers.dist.handshake import PeerIdentity
from workers.dist.header import Grant, StepHeader, bucket_of
from workers.dist.hub import PeerHub
from workers.dist.remote import RemoteDispatcher
from workers.dist.sockets import SocketTransport
from workers.dist.transport import DataTransport, Expected, Message, Part, Tag
from workers.families.base import BankSpec, ExchangeSpec

CPU = torch.device("cpu")
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """What is measured."""

    transport: str
    rows: int
    width: int
    num_experts: int
    top_k: int
    expert_ranks: int
    repeats: int

    @property
    def bank(self) -> BankSpec:
        """One OLMoE-like bank."""
        exchange = ExchangeSpec(index=0, name="mlp", in_width=self.width, out_width=self.width)
        return BankSpec(
            index=0,
            bank="mlp",
            layer=0,
            num_experts=self.num_experts,
            top_k=self.top_k,
            exchanges=(exchange,),
        )


@dataclass(frozen=True)
class Time:
    """Milliseconds of one exchange."""

    median: float = 0.0
    """Of all repeats after the first fifth."""
    fast: float = 0.0
    """The fastest tenth of them took at most this: what an idle machine does."""

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.fast:.3f})"


@dataclass(frozen=True)
class Times:
    """What one case took."""

    wire: Time
    """Transport alone."""
    sum: Time
    """Dispatch and combine."""


class IdleBank:
    """Experts that compute nothing: outputs that were made before."""

    def __init__(self, case: Case) -> None:
        self._outputs = torch.ones(case.rows * case.top_k, case.width, dtype=DTYPE)

    def compute(
        self, exchange: int, inputs: Tensor, pair_input: Tensor, pair_slot: Tensor
    ) -> Tensor:
        """See ``SlotBank``."""
        return self._outputs[: len(pair_slot)]


@dataclass(frozen=True)
class IdleSlots:
    """All banks of an idle expert rank."""

    banks: Sequence[IdleBank]


def measure(case: Case) -> Times:
    """Run one case in processes of its own."""
    results = run_ranks(1 + case.expert_ranks, _rank, case, timeout_s=120.0)
    times: Times = results[0]
    return times


def _rank(rank: int, size: int, ports: list[int], case: Case) -> Times:
    logging.disable(logging.WARNING)
    members = [_member(r, ports) for r in range(size)]
    me = members[rank]
    identity = PeerIdentity(
        name=me.name, role=me.role, rank=me.rank, checkpoint_id="bench", config_hash="bench"
    )
    hub = PeerHub(
        identity,
        "bench",
        max_data_bytes=max_data_bytes([case.bank], case.rows, 4, "sum"),
        port=ports[rank],
    )
    transport: DataTransport
    if case.transport == "sockets":
        transport = SocketTransport(hub, combine_mode="sum", device=CPU)
    else:
        store_port = ports[-1]
        transport = CollectiveTransport(hub, backend="gloo", device=CPU, store_port=store_port)
    generation = Generation(number=1, members=tuple(members))
    _join(hub, generation)
    transport.apply_generation(generation)
    run = _attention if rank == 0 else _expert
    times = run(rank, transport, case, generation)
    transport.close()
    hub.close()
    return times


def _member(rank: int, ports: list[int]) -> Member:
    return Member(
        name=f"rank-{rank}",
        role="attention" if rank == 0 else "expert",
        rank=max(rank - 1, 0),
        device=rank - 1,
        data_address=f"127.0.0.1:{ports[rank]}",
        store_address=f"127.0.0.1:{ports[-1]}" if rank == 0 else "",
    )


def _join(hub: PeerHub, generation: Generation) -> None:
    """Processes start at different times: try again while nobody listens."""
    deadline = time.monotonic() + 60.0
    while True:
        try:
            hub.apply_generation(generation)
        except PeerLostError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return


def _header(case: Case, step: int) -> StepHeader:
    return StepHeader(
        generation=1,
        step=step,
        epoch=1,
        oldest_epoch=1,
        grants=((0, Grant(decode_rows=case.rows)),),
        bucket=bucket_of(case.rows),
    )


def _attention(rank: int, transport: DataTransport, case: Case, generation: Generation) -> Times:
    rows = torch.randn(case.rows, case.width).to(DTYPE)
    scores, ids = torch.rand(case.rows, case.num_experts).topk(case.top_k)
    meta = ids.to(torch.int32)
    part = (Part(case.width, DTYPE),)
    expected = [Expected(r, part, (case.rows,)) for r in range(case.expert_ranks)]
    messages = [Message(r, (meta, rows)) for r in range(case.expert_ranks)]

    def wire(step: int) -> None:
        transport.begin_step(_header(case, step))
        transport.post(Tag(0, 0, 0, "rows"), messages, sized=False)
        transport.receive(Tag(0, 0, 0, "outputs"), expected, sized=False)

    dispatcher = RemoteDispatcher(
        transport, [case.bank], rank=0, combine_mode="sum", dtype=DTYPE, device=CPU
    )
    dispatcher.set_placement(_placement(case), generation)
    batch = BatchRows.decode(case.rows)

    def whole(step: int) -> None:
        dispatcher.begin_step(_header(case, step), [batch])
        dispatcher.combine(dispatcher.dispatch(rows, ids, scores, 0))

    return Times(wire=_time(wire, 1, case), sum=_time(whole, 1 + case.repeats, case))


def _time(call: Callable[[int], None], first_step: int, case: Case) -> Time:
    times = []
    for step in range(first_step, first_step + case.repeats):
        start = time.perf_counter()
        call(step)
        times.append((time.perf_counter() - start) * 1e3)
    kept = sorted(times[case.repeats // 5 :])
    return Time(median=statistics.median(kept), fast=kept[len(kept) // 10])


def _expert(rank: int, transport: DataTransport, case: Case, generation: Generation) -> Times:
    parts = (Part(case.top_k, torch.int32), Part(case.width, DTYPE))
    expected = [Expected(0, parts, (case.rows, case.rows))]
    outputs = torch.ones(case.rows, case.width, dtype=DTYPE)
    for step in range(1, 1 + case.repeats):
        transport.begin_step(_header(case, step))
        transport.receive(Tag(0, 0, 0, "rows"), expected, sized=False)
        transport.post(Tag(0, 0, 0, "outputs"), [Message(0, (outputs,))], sized=False)
    server = ExpertServer(
        transport,
        IdleSlots([IdleBank(case)]),
        [case.bank],
        device_index=rank - 1,
        combine_mode="sum",
        dtype=DTYPE,
        device=CPU,
    )
    server.set_placement(_placement(case), generation)
    for step in range(1 + case.repeats, 1 + 2 * case.repeats):
        server.run_step(_header(case, step))
    # The outputs of the last step may still wait here: the home side closes when it has them.
    try:
        transport.begin_step(_header(case, 1 + 2 * case.repeats))
        transport.receive(Tag(0, 0, 0, "rows"), expected, sized=False)
    except PeerLostError:
        return Times(wire=Time(), sum=Time())
    raise AssertionError("the attention rank went on")


def _placement(case: Case) -> ExpertPlacement:
    shape = BankShape(bank="mlp", layer=0, num_experts=case.num_experts)
    return contiguous([shape], case.expert_ranks)


def section(quick: bool) -> str:
    """The section of ``RESULTS.md``."""
    repeats = 20 if quick else 300
    rows = []
    for num_rows, width, expert_ranks in ((64, 2048, 2), (32, 512, 1)):
        for transport in ("sockets", "collective"):
            case = Case(
                transport=transport,
                rows=num_rows,
                width=width,
                num_experts=64,
                top_k=8,
                expert_ranks=expert_ranks,
                repeats=repeats,
            )
            times = measure(case)
            name = f"{transport}, 1 + {expert_ranks} ranks, {num_rows} x {width}"
            rows.append([name, str(times.wire), str(times.sum)])
    head = ["transport, ranks, rows", "wire ms", "dispatch + combine ms"]
    return (
        "## Dispatch and combine\n\nOne exchange of bfloat16 rows, top-8 of 64 experts that "
        "compute nothing, one thread a rank. `wire` is the transport alone. Median of "
        f"{repeats * 4 // 5} repeats (the fastest tenth took at most).\n\n{table(head, rows)}"
    )


if __name__ == "__main__":
    sys.stdout.write(section(quick=False) + "\n")
