"""CPU time of the controller in a recovery with 80 members, without workers and sockets.

    python -m benchmarks.fan_out --experts 64 --attention 16 --layers 62 --num-experts 128

A cluster serves, an expert worker is lost, the others answer. ``lost`` is the time from the loss to
the last order, ``answers`` that of all answers until the generation runs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from cluster.actors.control_server import ControlServer, _Connection
from cluster.config.cluster import ClusterConfig
from cluster.config.model import ModelSection
from cluster.controller.cluster import Cluster
from cluster.controller.controller import Controller
from cluster.controller.effects import SendFrame
from cluster.controller.settings import ControllerSettings
from cluster.core.frames import (
    ControlFrame,
    ExpertsLoaded,
    GenerationReady,
    LoadExperts,
    NewGeneration,
    Register,
    WorkerReady,
)
from cluster.core.load_profile import BankLoad, LoadProfile
from cluster.core.placement import BankShape, contiguous
from cluster.core.topology import Member, Role


class Sink:
    """Replaces a socket and counts bytes."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self.transport = self

    def is_closing(self) -> bool:
        return False

    def write(self, data: bytes) -> None:
        self.num_bytes += len(data)

    def get_write_buffer_size(self) -> int:
        return 0

    def close(self) -> None:
        return None


class Link:
    """Encodes and counts the frames of the controller, and keeps them for the replies."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.sinks: dict[str, Any] = {m.name: Sink() for m in members}
        self.sent: list[tuple[str, ControlFrame]] = []
        self._server = ControlServer("a token", self)
        reader: Any = None
        for name, sink in self.sinks.items():
            self._server._workers[name] = _Connection(reader, writer=sink)

    def carry_out(self, cluster: Cluster) -> None:
        for effect in cluster.take_effects():
            if isinstance(effect, SendFrame):
                self.sent += [(worker, effect.frame) for worker in effect.workers]
                self._server.send(effect.frame, *effect.workers)

    def on_frame(self, worker: str, frame: ControlFrame) -> None:
        return None

    def on_closed(self, worker: str, reason: str, is_invalid: bool) -> None:
        return None


def answer_all(controller: Controller, link: Link) -> float:
    """Let all workers reply to their frames; returns the CPU seconds of the controller."""
    took_s = 0.0
    devices = {m.name: m.device for m in controller.cluster.generation.experts}
    while link.sent:
        sent, link.sent = link.sent, []
        answers: list[tuple[str, ControlFrame]] = []
        for name, frame in sent:
            if isinstance(frame, LoadExperts):
                answers.append((name, ExpertsLoaded(order=frame.order)))
            elif isinstance(frame, NewGeneration):
                device = devices.get(name)
                banks = frame.placement.banks if device is not None else ()
                slots = tuple(b.physical_to_logical[device or 0] for b in banks)
                ready = GenerationReady(
                    generation=frame.generation.number,
                    highest_step=1,
                    highest_epoch=1,
                    slots=slots,
                )
                answers.append((name, ready))
        began = time.process_time()
        for name, answer in answers:
            controller.frame(name, answer, 1.0)
            link.carry_out(controller.cluster)
        took_s += time.process_time() - began
    return took_s


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Run one recovery."""
    pools: tuple[tuple[Role, int], ...] = (
        ("attention", options.attention),
        ("expert", options.experts),
    )
    members = tuple(
        Member(name=f"{role}-{i}", role=role, rank=i, device=i if role == "expert" else -1)
        for role, count in pools
        for i in range(count)
    )
    shapes = [
        BankShape(bank="mlp", layer=layer, num_experts=options.num_experts)
        for layer in range(options.layers)
    ]
    counts = (1.5,) * options.num_experts
    load = tuple(BankLoad(bank=s.bank, layer=s.layer, counts=counts) for s in shapes)
    notes: dict[str, Any] = {
        "profile": LoadProfile(model="m", top_k=8, tokens=1, banks=load).to_dict()
    }
    link = Link(members)
    placement = contiguous(shapes, options.experts, options.redundant)
    config = ClusterConfig(model=ModelSection(path="x", served_model_name="m"))
    with ThreadPoolExecutor(1) as executor:
        cluster = Cluster(members, placement, config, now=0.0, notes=notes)
        controller = Controller(cluster, ControllerSettings(), executor)
        for member in members:
            controller.frame(member.name, Register(member=member), 0.0)
        for member in members:
            controller.frame(member.name, WorkerReady(), 0.0)
        link.carry_out(controller.cluster)
        answer_all(controller, link)
        assert controller.cluster.runs
        before = sum(sink.num_bytes for sink in link.sinks.values())
        began = time.process_time()
        controller.lost({"expert-3": "closed"}, 1.0)
        link.carry_out(controller.cluster)
        lost_s = time.process_time() - began
        answers_s = answer_all(controller, link)
        assert controller.cluster.runs
    num_bytes = sum(sink.num_bytes for sink in link.sinks.values()) - before
    return {"lost": 1e3 * lost_s, "answers": 1e3 * answers_s, "MB": num_bytes / 1e6}


def main() -> None:
    """Print the median of the repetitions."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fan_out", description=__doc__)
    parser.add_argument("--attention", type=int, default=16)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--layers", type=int, default=62)
    parser.add_argument("--num-experts", type=int, default=128)
    parser.add_argument("--redundant", type=int, default=2, help="spare slots a worker")
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    found = [measure(options) for _ in range(options.repetitions)]
    middle = {name: statistics.median(each[name] for each in found) for name in found[0]}
    print(
        f"{options.attention} + {options.experts} workers, {options.layers} layers, "
        f"{options.num_experts} experts: {middle['lost']:.1f} ms after the loss, "
        f"{middle['answers']:.1f} ms for the answers, {middle['MB']:.1f} MB sent"
    )
