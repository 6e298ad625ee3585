"""The controller of a large cluster, whose workers are only the frames that they would send.

It counts what the controller sends: frames, bytes, and versions of the state for a caller that asks
for every change, as gateways and the launcher do.
"""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from msgspec.structs import replace

from benchmarks.harness.large_snapshot import snapshot_of
from benchmarks.harness.members import members_of
from cluster.config.cluster import ClusterConfig
from cluster.config.model import ModelSection
from cluster.config.workers import WorkersSection
from cluster.controller.cluster import Cluster
from cluster.controller.controller import Controller
from cluster.controller.effects import SendFrame
from cluster.controller.settings import ControllerSettings
from cluster.core.arithmetic import ArithmeticOffer
from cluster.core.control_codec import decode, encode
from cluster.core.frames import (
    ControlFrame,
    GenerationReady,
    Heartbeat,
    LoadProgress,
    Register,
    WorkerReady,
)
from cluster.core.load_report import BankCounts, LoadReport
from cluster.core.placement import BankShape, contiguous
from cluster.core.release import Build
from cluster.core.topology import Member

NUM_REPORTS = 10
"""Number of reports of each worker while it reads its weights, one each 0.2 s."""
_TOTAL_BYTES = 10**10


class LargeCluster:
    """A controller with ``num_members`` workers, half of them attention and half expert workers."""

    def __init__(self, num_members: int, num_layers: int = 61, num_experts: int = 384) -> None:
        half = num_members // 2
        self.members = members_of({"attention": half, "expert": half})
        shapes = [
            BankShape(bank="mlp", layer=n, num_experts=num_experts) for n in range(num_layers)
        ]
        config = ClusterConfig(
            model=ModelSection(path="somewhere", served_model_name="large"),
            workers=WorkersSection(num_attention_workers=half, num_expert_workers=half),
        )
        self.cluster = Cluster(
            self.members,
            contiguous(shapes, half, num_redundant=1),
            config,
            now=0.0,
            num_slots=num_experts // half + 1,
            notes={"top_k": 8},
        )
        settings, executor = ControllerSettings.of(config), ThreadPoolExecutor(1)
        self.controller = Controller(self.cluster, settings, executor)
        self.now = 0.0
        self.num_encoded: Counter[str] = Counter()
        """Number of encoded frames by type; a frame to several workers is encoded once."""
        self.num_bytes: Counter[str] = Counter()
        """Number of sent bytes by type of frame."""
        self.num_versions = 0
        """Number of states that a caller has got which waits for every change."""
        self.newest: dict[str, Any] = {}
        self._version = -1

    def start(self) -> None:
        """Start all workers, until the first generation runs."""
        for member in self.members:
            self.controller.created(member.name, self.now)
        build = Build(checkpoint_id="large", config_hash="settings")
        for member in self.members:
            own = Register(member=_address(member), build=build, info={"device": "cpu"})
            self.send(member.name, own)
        for number in range(1, NUM_REPORTS + 1):
            self.now += 0.1
            self.tick()
            self.now += 0.1
            read = LoadProgress(
                loaded_bytes=number * _TOTAL_BYTES // NUM_REPORTS, total_bytes=_TOTAL_BYTES
            )
            for member in self.members:
                self.send(member.name, read)
            self.tick()
        for member in self.members:
            self.send(member.name, WorkerReady())
        for member in self.members:
            self.send(member.name, self._opened(member))

    def beat(self, encoded: dict[str, bytes]) -> None:
        """Take a heartbeat of each worker, as it arrives from a socket."""
        for name, data in encoded.items():
            self.send(name, decode(data[4:]))

    def heartbeats(self) -> dict[str, bytes]:
        """Return an encoded heartbeat of each worker, with the expert load of attention workers."""
        half = len(self.members) // 2
        stats = {one["name"]: one["stats"] for one in snapshot_of(half, half)["workers"]}
        return {
            member.name: encode(
                Heartbeat(
                    progress=3,
                    idle=False,
                    generation=1,
                    running=True,
                    epoch=1,
                    stats=stats[member.name],
                    expert_load=self._load(member) if member.runs_attention else None,
                )
            )
            for member in self.members
        }

    def send(self, name: str, frame: ControlFrame) -> None:
        """Handle a frame of a worker, and encode what the controller sends."""
        self.controller.frame(name, frame, self.now)
        self.carry_out()

    def tick(self) -> None:
        """Tick the controller, and encode what it sends."""
        self.controller.tick(self.now)
        self.carry_out()

    def carry_out(self) -> None:
        """Encode each frame once, count it for each receiver, and take the state if it is new."""
        for effect in self.cluster.take_effects():
            if isinstance(effect, SendFrame):
                kind = type(effect.frame).__name__
                self.num_encoded[kind] += 1
                self.num_bytes[kind] += len(encode(effect.frame)) * len(effect.workers)
        if self.cluster.version != self._version:
            self._version = self.cluster.version
            self.num_versions += 1
            self.newest = self.controller.snapshot()

    def _opened(self, member: Member) -> GenerationReady:
        banks = self.cluster.placement.banks
        slots = (
            tuple(bank.physical_to_logical[member.device] for bank in banks)
            if member.holds_experts
            else ()
        )
        number = self.cluster.round.number
        return GenerationReady(generation=number, highest_step=0, highest_epoch=0, slots=slots)

    def _load(self, member: Member) -> LoadReport:
        draws = np.random.default_rng(member.rank)
        banks = {}
        for bank in self.cluster.placement.banks:
            counts = draws.integers(1_000, 60_000, bank.num_experts)
            banks[bank.bank, bank.layer] = BankCounts(
                prefill=counts,
                decode=counts,
                epoch_prefill=np.stack([counts, counts], 1),
                epoch_decode=counts,
            )
        return LoadReport(epoch=1, rows=100_000 + member.rank, banks=banks)


def _address(member: Member) -> Member:
    """Return the member as it registers, with addresses of a host of its own."""
    host = f"10.{member.runs_attention:d}.0.{member.rank}"
    return replace(
        member,
        node=host,
        pid=1000 + member.rank,
        data_address=f"{host}:4000",
        engine_address=f"{host}:4001" if member.runs_attention else "",
        weights_address=f"{host}:4002" if member.holds_experts else "",
        kv_address=f"{host}:4003" if member.runs_attention else "",
        offer=ArithmeticOffer(kernels=("dot", "fma")),
    )
