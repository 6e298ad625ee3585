"""Work of a step or a request in large clusters: ``python -m benchmarks.engine.scale [--json]``.

Runs the real classes of one process among 8, 32 and 128 members, half of them attention workers and
half expert workers, over sockets on loopback. Prints CPU time of the measured thread, the median of
steps in the fastest of ten parts of a run, and of all rounds the least (the speed of a shared
machine changes by half within seconds):

    leader      what only the leader does: read proposals, decide, send headers
    header      what each rank does with a header that has arrived: check it and read its own grant
    proposal    what each rank does to propose its rows
    grants      an expert worker's preparation of a step: rows of each attention rank
    scheduler   intent and plan of a worker with 256 running and 4,000 waiting sequences of 1,000
                tenants
    admission   a gateway's admission of a request while 10,000 of 1,000 tenants wait
    loss        a controller's decision after the loss of an expert worker, with its orders to the
                others, for a model with 61 layers of 384 experts
    scrape      a gateway's answer to Prometheus, for a model with 61 layers of 384 experts
    start, beats, load, status, page
                work of a controller and of a page of the dashboard (``scale_control``)
    rank        header, proposal, grants and scheduler together, of which the growth is printed

Scheduler and admission do not depend on the members, and are measured once in a round. Messages of
the layers are not counted.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass

import torch

from benchmarks.engine.scale_control import control_us
from benchmarks.harness.both_roles import Alone
from benchmarks.harness.large_snapshot import load_of_banks, snapshot_of
from benchmarks.harness.mesh import CPU, FakeBank, make_bank, make_connections, make_placement
from cluster.cli.terminal.arguments import count
from cluster.cli.terminal.output import table
from cluster.core.control_codec import encode
from cluster.core.frames import NewGeneration
from cluster.core.placement import BankShape, contiguous
from cluster.core.topology import Generation, Member
from cluster.policy.coverage import ExpertHoldings, decide_members
from gateway.calls.admission import Admission
from gateway.calls.tenant_queues import CallDemand
from gateway.observability.metrics import GatewayMetrics
from workers.dispatch.expert_server import ExpertServer
from workers.engine.micro_batches import MicroBatchRule
from workers.engine.prefill_cap import PrefillCap
from workers.engine.step_channel import StepChannel
from workers.engine.step_leader import StepLeader
from workers.engine.step_proposals import PROPOSALS, StepProposal, StepProposals
from workers.engine.step_tree import StepTree
from workers.kv.block_pool import BlockPool
from workers.requests.request import Request, SamplingParams
from workers.requests.sequence import SequenceState
from workers.requests.step_header import HEADERS, Grant, Grants, StepHeader
from workers.scheduling.scheduler import Scheduler
from workers.scheduling.step_intent import Restriction
from workers.scheduling.step_plan import RowsWanted
from workers.transport.frames import FrameHeader, FrameKind
from workers.transport.peer_connections import PeerConnections

MEMBERS = (8, 32, 128)
OF_A_RANK = ("header", "proposal", "grants", "scheduler")
_ROWS = RowsWanted(decode_rows=8, edge_share=300)
_BANK = make_bank(num_experts=256, top_k=8)


@dataclass(frozen=True, slots=True)
class ScaleCost:
    """Cost of one kind of work."""

    what: str
    members: int
    """Number of workers, half of them attention workers."""
    us: float
    """Microseconds of CPU time: least median of ten parts of a run, and least of all rounds; for
    ``rank`` the sum of these."""


def _generation(num_members: int) -> Generation:
    half = num_members // 2
    members = [Member(name=f"attention-{r}", role="attention", rank=r) for r in range(half)]
    members += [Member(name=f"expert-{r}", role="expert", rank=r, device=r) for r in range(half)]
    return Generation(number=1, members=tuple(members))


@contextmanager
def _neighbours(
    generation: Generation, name: str
) -> Iterator[tuple[PeerConnections, dict[str, PeerConnections]]]:
    """Open the connections of a worker to its parent and its children, and yield all of them.

    The worker belongs to the whole ``generation``, the others only to one of two members.
    """
    tree = StepTree.of(generation, name)
    near = [m for m in generation.members if m.name in {*tree.children, tree.parent}]
    (me,) = (m for m in generation.members if m.name == name)
    with ExitStack() as stack, ThreadPoolExecutor(len(near) + 1) as pool:
        opened = {m.name: make_connections(m.role, m.rank) for m in (me, *near)}
        for connections in opened.values():
            stack.callback(connections.close)

        def join(*members: Member) -> Generation:
            reachable = (
                Member(name=m.name, role=m.role, rank=m.rank, data_address=opened[m.name].address)
                for m in members
            )
            return Generation(number=1, members=tuple(reachable))

        applied = [pool.submit(opened[name].apply_generation, join(me, *near))]
        applied += [pool.submit(opened[m.name].apply_generation, join(me, m)) for m in near]
        for future in applied:
            future.result()
        mine = opened.pop(name)
        mine.generation = generation
        yield mine, opened


def _channel(connections: PeerConnections) -> StepChannel:
    leader = StepLeader(prefill_cap=PrefillCap(max_rows=512), micro_batches=MicroBatchRule())
    channel = StepChannel(connections, leader)
    channel.start_generation(1, epoch=1)
    return channel


def _send(sender: PeerConnections, name: str, kind: FrameKind, step: int, data: bytes) -> None:
    sender.send(name, FrameHeader(kind, 1, step, length=len(data)), [data])


def _drain(peer: PeerConnections) -> None:
    """Take the next step frame that the measured worker has sent to ``peer``."""
    while not peer.step_frames():
        peer.poll(1.0)
    peer.step_frames().popleft()


def _settle() -> None:
    """Give the bytes of a loopback connection time to arrive, so that no wait is measured."""
    time.sleep(2e-4)


def _typical_us(taken_ns: Sequence[int]) -> float:
    """Return the least median of ten parts, as other work on the machine disturbs some of them."""
    length = max(len(taken_ns) // 10, 1)
    parts = (taken_ns[i : i + length] for i in range(0, len(taken_ns), length))
    return min(statistics.median(part) for part in parts) / 1e3


def leader_us(num_members: int, steps: int) -> float:
    """Return the CPU time of the leader for a step."""
    generation = _generation(num_members)
    tree = StepTree.of(generation, "attention-0")
    taken = []
    with _neighbours(generation, "attention-0") as (connections, children):
        channel = _channel(connections)
        for step in range(1, steps + 1):
            for name, ranks in tree.ranks_below.items():
                proposals = tuple(StepProposal.of(rank, _ROWS) for rank in sorted(ranks))
                message = StepProposals(generation=1, step=step, proposals=proposals)
                data = PROPOSALS.encode(message)
                _send(children[name], "attention-0", FrameKind.PROPOSAL, step, data)
            _settle()
            began = time.thread_time_ns()
            channel.propose(_ROWS)
            header = channel.wait(10.0)
            taken.append(time.thread_time_ns() - began)
            assert header is not None
            for child in children.values():
                _drain(child)
    return _typical_us(taken)


def rank_us(num_members: int, steps: int) -> tuple[float, float]:
    """Return the CPU time of the last attention rank for a header, and for a proposal."""
    generation = _generation(num_members)
    name, rank = f"attention-{num_members // 2 - 1}", num_members // 2 - 1
    headers, proposals = [], []
    with _neighbours(generation, name) as (connections, near):
        (parent,) = near.values()
        channel = _channel(connections)
        for step in range(1, steps + 1):
            began = time.thread_time_ns()
            channel.propose(_ROWS)
            proposals.append(time.thread_time_ns() - began)
            _drain(parent)
            data = HEADERS.encode(_header(num_members, step))
            _send(parent, name, FrameKind.HEADER, step, data)
            while not connections.step_frames():
                connections.poll(1.0)
            began = time.thread_time_ns()
            header = channel.wait(10.0)
            assert header is not None
            assert header.grant(rank).num_rows
            assert header.rows(rank, 0)
            assert header.edge_rows(rank, 0)
            headers.append(time.thread_time_ns() - began)
    return _typical_us(headers), _typical_us(proposals)


def grants_us(num_members: int, steps: int) -> float:
    """Return the CPU time in which an expert worker prepares a step."""
    generation = _generation(num_members)
    placement = make_placement([_BANK], num_members // 2)
    slots = FakeBank(_BANK, placement.banks[0].physical_to_logical[0])
    server = ExpertServer(
        Alone(),
        [slots],
        [_BANK],
        device_index=0,
        combine_mode="sum",
        dtype=torch.float32,
        device=CPU,
    )
    server.set_placement(placement, generation)
    taken = []
    for step in range(1, steps + 1):
        header = HEADERS.decode(HEADERS.encode(_header(num_members, step)))
        began = time.thread_time_ns()
        server.begin_step(header)
        taken.append(time.thread_time_ns() - began)
    return _typical_us(taken)


def _header(num_members: int, step: int) -> StepHeader:
    grants = {rank: Grant(decode_rows=8 + rank % 3) for rank in range(num_members // 2)}
    return StepHeader(generation=1, step=step, epoch=1, oldest_epoch=1, grants=Grants.of(grants))


def scheduler_us(
    steps: int, num_running: int = 256, num_waiting: int = 4_000, num_tenants: int = 1_000
) -> float:
    """Return the CPU time in which a worker whose seats are taken plans a step of decodes."""
    scheduler = Scheduler(
        BlockPool(8192),
        block_size=16,
        max_num_seqs=num_running,
        max_num_batched_tokens=512,
        max_model_len=8192,
        eos_token_ids=(2,),
    )
    params = SamplingParams(max_tokens=steps + 100, ignore_eos=True)
    taken: list[int] = []
    for number in range(num_running + num_waiting):
        request = Request(
            request_id=f"r{number}",
            prompt=(number % 997, 5, 6, 7),
            params=params,
            tenant=f"tenant-{number % num_tenants}",
        )
        scheduler.add(SequenceState(request, 0, number, math.inf))
    while len(taken) < steps:
        began = time.thread_time_ns()
        intent = scheduler.intent(Restriction())
        wanted = intent.wanted
        grant = Grant(decode_rows=wanted.decode_rows, prefill_rows=wanted.prefill_rows)
        plan = scheduler.plan(intent, grant)
        if not wanted.prefill_rows:
            taken.append(time.thread_time_ns() - began)
        drawn = {rows.sequence: (5,) for rows in plan.rows if rows.samples_token}
        scheduler.commit(plan, drawn, ())
    return _typical_us(taken)


def admission_us(calls: int, num_waiting: int = 10_000, num_tenants: int = 1_000) -> float:
    """Return the CPU time in which a gateway checks and admits a call."""
    admission = Admission(max_requests=2 * num_waiting, max_tokens=1 << 40, capacity=256)
    demands = [
        CallDemand(num_tokens=100 + i % 37, tenant=f"tenant-{i % num_tenants}", weight=1.0 + i % 3)
        for i in range(num_waiting)
    ]
    tickets = [admission.admit(demand, 0.0) for demand in demands]
    taken = []
    for number in range(2 * calls):
        demand, now_s = demands[number % num_waiting], 1.0 + number / 1e3
        tickets[number % num_waiting].release(now_s)
        began = time.thread_time_ns()
        admission.check(demand, now_s)
        admission.queue_time_s(demand)
        tickets[number % num_waiting] = admission.admit(demand, now_s)
        if number >= calls:  # the service rate is known
            taken.append(time.thread_time_ns() - began)
    return _typical_us(taken)


def loss_us(num_members: int, num_layers: int = 61, num_experts: int = 384) -> float:
    """Return the CPU time from the loss of an expert worker to the encoded orders of a controller.

    Another worker has a free slot for each expert that is lost, and loads it.
    """
    generation = _generation(num_members)
    shapes = [BankShape(bank="mlp", layer=i, num_experts=num_experts) for i in range(num_layers)]
    placement = contiguous(shapes, num_members // 2, num_redundant=1)
    holdings = ExpertHoldings(current=placement, desired=placement)
    left = [m for m in generation.members if m.name != "expert-1"]
    taken = []
    for _ in range(5):
        began = time.thread_time_ns()
        stage = decide_members(left, holdings, 1).stage
        assert stage is not None
        next_generation = generation.successor(left)
        encode(NewGeneration(term=1, generation=next_generation, placement=stage.placement))
        taken.append(time.thread_time_ns() - began)
    return min(taken) / 1e3


def scrape_us(num_members: int, num_layers: int = 61, num_experts: int = 384) -> float:
    """Return the CPU time in which a gateway renders its metrics and those of all workers."""
    half = num_members // 2
    snapshot, load = snapshot_of(half, half), load_of_banks(num_layers, num_experts)
    metrics = GatewayMetrics("model", lambda: snapshot, load=lambda: load)
    for rank in range(half):
        metrics.engine(str(rank))
    taken = []
    for _ in range(5):
        began = time.thread_time_ns()
        metrics.render()
        taken.append(time.thread_time_ns() - began)
    return min(taken) / 1e3


def measure(members: Sequence[int], steps: int, rounds: int) -> list[ScaleCost]:
    """Return all costs in clusters of the given sizes, the least of ``rounds`` each."""
    files, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(files, min(4096, most_files)), most_files))
    taken: dict[int, list[dict[str, float]]] = {number: [] for number in members}
    for _ in range(rounds):
        alone = {"scheduler": scheduler_us(steps), "admission": admission_us(steps)}
        for number, costs in taken.items():
            costs.append(_costs(number, steps) | alone)
    found = []
    for number, costs in taken.items():
        least = {what: min(of_round[what] for of_round in costs) for what in costs[0]}
        least["rank"] = sum(least[what] for what in OF_A_RANK)
        found += [ScaleCost(what, number, round(us, 1)) for what, us in least.items()]
    return found


def _costs(num_members: int, steps: int) -> dict[str, float]:
    """Return the costs that depend on the members."""
    header, proposal = rank_us(num_members, steps)
    return {
        "leader": leader_us(num_members, steps),
        "header": header,
        "proposal": proposal,
        "grants": grants_us(num_members, steps),
        "loss": loss_us(num_members),
        "scrape": scrape_us(num_members),
        **control_us(num_members),
    }


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine.scale")
    parser.add_argument("--members", type=count, nargs="+", default=MEMBERS, metavar="N")
    parser.add_argument("--steps", type=count, default=200, metavar="N", help="of each cost (200)")
    parser.add_argument("--rounds", type=count, default=3, metavar="N", help="of all (3)")
    parser.add_argument("--json", action="store_true", help="print a JSON object for each row")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all costs, and print a row for each and a column for each number of members."""
    args = make_parser().parse_args(arguments)
    members = [*dict.fromkeys(args.members)]
    found = measure(members, args.steps, args.rounds)
    if args.json:
        sys.stdout.writelines(json.dumps(asdict(cost)) + "\n" for cost in found)
        return 0
    rows = []
    for what in dict.fromkeys(cost.what for cost in found):
        costs = [cost.us for cost in found if cost.what == what]
        rows.append([what, *costs, f"{costs[-1] / costs[0]:.2f}"])
    columns = [f"{number} MEMBERS" for number in members]
    sys.stdout.write(table(["US OF CPU TIME", *columns, "GROWTH"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
