"""1 + 1 workers on one device: results equal those of one process, also after a kill.

The attention worker has an engine, the expert worker its experts, both the transport of a cluster;
the section stands in for the controller. The expert worker is killed in the middle of a step. Its
successor joins the next generation, in which all requests are served to their ends.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal, cast

import torch

from benchmarks.gpu_check.engines import (
    MAX_MODEL_LEN,
    PLAIN,
    Differences,
    Model,
    equal,
    random_model,
)
from benchmarks.gpu_check.section import Place, Report
from benchmarks.harness.local_engine import Generated, LocalEngine, generated
from cluster.core.errors import PeerLostError
from cluster.core.placement import BankShape, ExpertPlacement, contiguous
from cluster.core.topology import Generation, Member
from workers.cuda.step_graph import StepGraph
from workers.dispatch.dispatcher import TokenDispatcher, max_static_ranks
from workers.dispatch.expert_server import ExpertServer
from workers.dispatch.remote import RemoteDispatcher
from workers.engine.micro_batches import MicroBatchRule
from workers.engine.prefill_cap import PrefillCap
from workers.engine.step_channel import StepChannel
from workers.engine.step_leader import StepLeader
from workers.experts.slots import ExpertSlots
from workers.model.config import BankSpec
from workers.requests.buckets import buckets_up_to
from workers.requests.request import Request, TokenOutput
from workers.requests.step_header import StepHeader
from workers.transport.collective import CollectiveTransport
from workers.transport.frames import max_data_bytes
from workers.transport.handshake import PeerIdentity
from workers.transport.nccl_environment import set_nccl_environment
from workers.transport.peer_connections import PeerConnections
from workers.transport.sockets import SocketTransport
from workers.transport.transport import CapturedMessages, DataTransport, RowMessage, Tag

TransportName = Literal["sockets", "collective"]
DTYPE = torch.float32
KILLED_IN_STEP = 6
_STEP_LIMIT_S = 60.0
_ALIVE_S = 90.0
"""Seconds; longer than any limit after which torch's NCCL watchdog ends a process."""
_START_S = 45.0
"""Seconds of a section's time for start, connection and end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """Transport and kill of the workers of a section."""

    place: Place
    transport: TransportName
    killed_in_step: int
    """Step at which the expert worker is killed; 0 if it is not killed."""
    alive_s: float
    """Seconds for which the survivor serves requests after the loss."""
    is_short: bool = False
    """Whether this time is shorter than required."""


def sockets(place: Place, report: Report) -> None:
    """Run workers over sockets, without a kill and with one."""
    for step in (0, KILLED_IN_STEP):
        with report.part(f"killed in step {step}" if step else "nobody is killed"):
            case = Case(place=place, transport="sockets", killed_in_step=step, alive_s=0.0)
            run(case, report)


def collective(place: Place, report: Report) -> None:
    """Run workers over NCCL on one device (gloo on a CPU), and kill one of them."""
    if place.is_gpu:
        set_nccl_environment()  # what is started from now on inherits it
    alive_s = watch_s(place)
    case = Case(
        place=place,
        transport="collective",
        killed_in_step=KILLED_IN_STEP,
        alive_s=alive_s,
        is_short=alive_s < _ALIVE_S,
    )
    run(case, report)


def watch_s(place: Place) -> float:
    """How long the survivor is watched: as long as it should be, or as the section's time allows.

    100 s in all: 55 s.
    """
    return 0.0 if place.is_tiny else max(0.0, min(_ALIVE_S, place.limit_s - _START_S))


def run(case: Case, report: Report) -> None:
    """Serve requests and compare the results with those of one process."""
    model = random_model(case.place, "olmoe")
    local = _local(case.place, model).generate(model.prompts, model.params)
    found = _Workers(case, report).run()
    seen = Differences()
    equal(report, case.transport, "float32", found["answers"], local, seen)
    rounds = found["later"]
    for other in rounds[:1] + rounds[-1:]:
        equal(report, f"{case.transport}, new generation", "float32", other, local, seen)
    times = found["times"]
    name = case.transport + (", killed" if case.killed_in_step else "")
    values: dict[str, Any] = {**times, "rounds": len(rounds), **seen.found["float32"]}
    report.value(name, {**values, "is_short": case.is_short})
    if case.killed_in_step:
        report.check("notice_s" in times, "no loss was noticed: the worker died too late")
        alive_s = times.get("alive_s", 0.0)
        report.check(alive_s >= case.alive_s, f"alive for {alive_s:.0f} s only")
        report.say(survival(case, times))
    else:
        report.say("equal to one process")


def survival(case: Case, times: Mapping[str, float]) -> str:
    """``short: watched for 55 of 90 s; loss noticed in 0.01 s, served again after 1.20 s``."""
    words = (
        f"loss noticed in {times.get('notice_s', 0.0):.2f} s, "
        f"served again after {times.get('served_s', 0.0):.2f} s"
    )
    watched = f"watched for {times.get('alive_s', 0.0):.0f}"
    if case.is_short:
        return f"short: {watched} of {_ALIVE_S:.0f} s; {words}"
    return f"{watched} s; {words}" if case.alive_s else words


class _Workers:
    """The processes of a case, and the role of the controller."""

    def __init__(self, case: Case, report: Report) -> None:
        self._case = case
        self._report = report
        self._context = multiprocessing.get_context("spawn")
        self._stack = ExitStack()

    def run(self) -> dict[str, Any]:
        """Result of the attention worker. Raises ``RuntimeError`` if a worker fails."""
        names = ["attention-0", "expert-0", "expert-1"][: 3 if self._case.killed_in_step else 2]
        with self._stack:
            pipes = [self._start(name) for name in names]
            members = [self._receive(pipe) for pipe in pipes]
            home = pipes[0]
            first = Generation(number=1, members=tuple(members[:2]))
            for pipe in pipes[:2]:
                pipe.send((first, 1))
            found = self._receive(home)
            if isinstance(found, int):
                second = Generation(number=2, members=(members[0], members[2]))
                for pipe in (home, pipes[2]):
                    pipe.send((second, found))
                found = self._receive(home)
        result: dict[str, Any] = found
        return result

    def _start(self, name: str) -> Connection:
        mine, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(theirs, name, self._case), daemon=True)
        process.start()
        theirs.close()
        self._stack.callback(process.join, 10.0)
        self._stack.callback(process.kill)
        self._stack.enter_context(mine)
        return mine

    def _receive(self, pipe: Connection) -> Any:
        if not pipe.poll(self._case.place.limit_s):
            raise RuntimeError("a worker does not answer")
        try:
            kind, value = pipe.recv()
        except EOFError as err:
            raise RuntimeError("a worker's process ended") from err
        if kind == "failure":
            raise RuntimeError(value)
        return value


def _work(pipe: Connection, name: str, case: Case) -> None:
    """Entry point of a worker's process."""
    os.environ["NCCL_HOSTID"] = name  # NCCL refuses a device that two ranks of one host have
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            worker = _Worker(name, case)
            pipe.send(("member", worker.member))
            (_serve_home if name == "attention-0" else _serve_experts)(worker, pipe)
    except EOFError:
        return  # it is not needed
    except Exception as err:
        pipe.send(("failure", f"{name}: {type(err).__name__}: {err}"))


class _Worker:
    """The data plane of a worker."""

    def __init__(self, name: str, case: Case) -> None:
        self.case = case
        self.model = random_model(case.place, "olmoe")
        self.checkpoint = self.model.open()
        self.banks: Sequence[BankSpec] = self.checkpoint.family.banks
        device, is_home = case.place.device, name == "attention-0"
        role: Literal["attention", "expert"] = "attention" if is_home else "expert"
        rank = int(name.split("-")[1])
        identity = PeerIdentity(name=name, role=role, rank=rank, checkpoint_id="c", config_hash="c")
        limit = max_data_bytes(self.banks, PLAIN.step_tokens, DTYPE.itemsize, "sum")
        self.connections = PeerConnections(
            identity,
            "token",
            max_data_bytes=limit,
            connect_timeout_s=_STEP_LIMIT_S,
            step_timeout_s=_STEP_LIMIT_S,
        )
        self.transport: SocketTransport | CollectiveTransport
        store_address = ""
        if case.transport == "sockets":
            self.transport = SocketTransport(self.connections, combine_mode="sum", device=device)
        else:
            self.transport = CollectiveTransport(
                self.connections,
                backend="nccl" if case.place.is_gpu else "gloo",
                device=device,
                connect_timeout_s=_STEP_LIMIT_S,
            )
            store_address = self.transport.rendezvous.store_address
        self.member = Member(
            name=name,
            role=role,
            rank=rank,
            device=-1 if is_home else 0,
            data_address=self.connections.address,
            store_address=store_address,
        )
        leader = StepLeader(
            prefill_cap=PrefillCap.of(PLAIN),
            micro_batches=MicroBatchRule(),
            buckets=buckets_up_to(PLAIN.max_num_seqs) if case.place.is_gpu else (),
            max_static_ranks=max_static_ranks(self.banks, "sum") if case.place.is_gpu else 0,
        )
        self.channel = StepChannel(self.connections, leader)

    @property
    def placement(self) -> ExpertPlacement:
        """Placement of all experts on the only expert worker."""
        shapes = [
            BankShape(bank=b.bank, layer=b.layer, num_experts=b.num_experts) for b in self.banks
        ]
        return contiguous(shapes, 1)

    def enter(self, pipe: Connection, owner: TokenDispatcher | ExpertServer) -> None:
        """Wait for a generation and its first step, and apply it as a worker does."""
        generation, first_step = pipe.recv()
        self.connections.apply_generation(generation)
        self.transport.apply_generation(generation)
        owner.set_placement(self.placement, generation)
        self.channel.start_generation(first_step, self.placement.epoch)

    def close(self) -> None:
        self.transport.close()
        self.connections.close()


class _Dying:
    """A transport whose process is killed when it has outputs of a certain step.

    In captured steps the host sends nothing, so the process is killed before the replay, for which
    the other worker's graph waits.
    """

    def __init__(self, inner: DataTransport, channel: StepChannel, step: int) -> None:
        self._inner = inner
        self._channel = channel
        self._step = step
        self._is_captured = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def capture(self, graph: StepGraph) -> CapturedMessages | None:
        captured = self._inner.capture(graph)
        self._is_captured = captured is not None
        return captured

    def begin_step(self, header: StepHeader) -> None:
        if self._is_captured and header.step == self._step:
            os.kill(os.getpid(), signal.SIGKILL)
        self._inner.begin_step(header)

    def post(self, tag: Tag, messages: Sequence[RowMessage], *, sized: bool) -> None:
        if tag.bank and self._channel.highest_step == self._step:
            os.kill(os.getpid(), signal.SIGKILL)
        self._inner.post(tag, messages, sized=sized)


def _serve_experts(worker: _Worker, pipe: Connection) -> None:
    """Serve until the attention worker has ended."""
    place, case = worker.case.place, worker.case
    most = max(bank.num_experts for bank in worker.banks)
    slots = ExpertSlots(worker.banks, most, DTYPE, place.device)
    slots.load_all(worker.checkpoint)
    transport: DataTransport = worker.transport
    if case.killed_in_step and worker.member.rank == 0:
        transport = cast(DataTransport, _Dying(transport, worker.channel, case.killed_in_step))
    server = ExpertServer(
        transport,
        slots.banks,
        worker.banks,
        device_index=0,
        combine_mode="sum",
        dtype=DTYPE,
        device=place.device,
    )
    worker.enter(pipe, server)
    try:
        while (header := worker.channel.wait(case.place.limit_s)) is not None:
            server.run_step(header)
    except PeerLostError:
        worker.close()  # the attention worker is done


def _serve_home(worker: _Worker, pipe: Connection) -> None:
    """Serve all requests to their ends, across a loss; then repeat until the time is over."""
    place, model = worker.case.place, worker.model
    remote = RemoteDispatcher(
        worker.transport,
        worker.banks,
        rank=0,
        combine_mode="sum",
        dtype=DTYPE,
        device=place.device,
    )
    engine = _local(place, model, lambda _: remote)
    worker.enter(pipe, remote)
    served, times = _Served(engine), {}
    served.begin(model)
    try:
        served.finish(worker)
    except PeerLostError:
        lost_at = time.monotonic()
        times["notice_s"] = lost_at - served.step_began
        pipe.send(("found", worker.channel.highest_step + 1))
        engine.engine.requests.record_worker_death()
        worker.enter(pipe, remote)
        engine.engine.requests.isolation.begin_generation()
        times["entered_s"] = time.monotonic() - lost_at
        served.step(worker)
        times["served_s"] = time.monotonic() - lost_at
        served.finish(worker)
    answers = served.answers()
    later: list[list[Generated]] = []
    while times and (not later or time.monotonic() - lost_at < worker.case.alive_s):
        served.begin(model)
        served.finish(worker)
        later.append(served.answers())
        times["alive_s"] = time.monotonic() - lost_at
    found = {"answers": answers, "later": later, "times": times}
    pipe.send(("found", found))
    worker.close()


class _Served:
    """Requests of an engine whose steps come from the step channel."""

    def __init__(self, engine: LocalEngine) -> None:
        self._engine = engine
        self._outputs: dict[str, list[TokenOutput]] = {}
        self.step_began = 0.0

    def begin(self, model: Model) -> None:
        """Add requests for all prompts."""
        self._outputs = {f"r{i}": [] for i in range(len(model.prompts))}
        for name, prompt in zip(self._outputs, model.prompts, strict=True):
            request = Request(request_id=name, prompt=tuple(prompt), params=model.params)
            self._engine.add_request(request)

    def finish(self, worker: _Worker) -> None:
        """Run steps until all have ended."""
        while self._engine.engine.has_work:
            self.step(worker)

    def step(self, worker: _Worker) -> None:
        """Run one step. Raises ``PeerLostError``."""
        worker.channel.propose(self._engine.engine.rows_wanted())
        header = worker.channel.wait(_STEP_LIMIT_S)
        assert header is not None, "a leader's header comes at once"
        self.step_began = time.monotonic()
        for output in self._engine.engine.step(header):
            self._outputs[output.request_id].append(output)

    def answers(self) -> list[Generated]:
        """Results of each prompt."""
        return [generated(outputs) for outputs in self._outputs.values()]


def _local(
    place: Place,
    model: Model,
    wrap: Callable[[TokenDispatcher], TokenDispatcher] | None = None,
) -> LocalEngine:
    """An engine on the device; ``wrap`` gives it other experts."""
    return LocalEngine(
        model.open(),
        dtype="float32",
        device=str(place.device),
        section=PLAIN,
        max_model_len=MAX_MODEL_LEN,
        kernels="torch",
        wrap=wrap,
    )
