"""The rows of the table of faults: layouts, and what happens in them."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.faults.load import wait
from benchmarks.faults.site import Site
from benchmarks.harness.serving_cluster import make_config
from cluster.config.cluster import ClusterConfig
from cluster.config.expert_load import LoadSection, RebalanceSection
from cluster.core.frames import (
    ControlFrame,
    EpochSwitched,
    ExpertsLoaded,
    LoadExperts,
    NewEpoch,
    SwitchEpoch,
)
from cluster.core.topology import Role
from cluster.policy.silence import WINDOW_S
from tests.long.epoch_phases import PHASE_CLASSES
from tests.long.reliability_report import FaultRow
from workers.process.worker.actor import ACTOR_CLASSES, WorkerActor

DETECTION_LIMIT_S = 2.0
FREEZE_S = 3.5
"""A frozen controller stands still for so long: longer than the detection limit."""
_ORDER_AGAIN_S = 5.0
"""After a rebalancing was ordered in which the controller should have died."""
_FORGET_S = 3 * WINDOW_S
"""Time after which a start and the gaps of its time count no more."""
_AFTER_S = 2.0
"""A pause may be longer than the freeze by so much."""

Fault = Callable[[Site], object]


def _nothing(site: Site) -> None:
    """Nothing happens, or nothing is needed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row(FaultRow):
    """One row, on processes of this host."""

    attention: int
    """Attention workers."""
    experts: int
    """Expert workers."""
    redundant: int = 0
    """Spare slots; 22 of 3 workers give every expert a second copy."""
    sections: Mapping[str, Any] = field(default_factory=dict)
    """Sections of the configuration that differ."""
    classes: Mapping[Role, type[WorkerActor]] = field(default_factory=lambda: ACTOR_CLASSES)
    """Actors of the workers."""
    fault: Fault
    """What happens."""
    prepare: Fault = _nothing
    """What must be there before."""
    after: Fault = _nothing
    """A check of the outcome, after ``changes``."""
    changes: str = "generation"
    """Key of the snapshot that grows when the cluster has dealt with it; empty: none does."""

    def config(self, checkpoint: Path) -> ClusterConfig:
        """Of the cluster."""
        plain = make_config(
            checkpoint,
            self.attention,
            self.experts,
            workers={"num_redundant_experts": self.redundant},
            engine={"kv_cache_bytes": 64 << 20},
            transport={"detection_limit_s": DETECTION_LIMIT_S},
        )
        return replace(plain, **self.sections)


def _kill_during_change(site: Site) -> None:
    first, second = site.names("expert", 2)
    before = site.snapshot()["generation"]
    site.signal([first], signal.SIGKILL)
    wait(
        lambda: (now := site.snapshot())["state"] == "RECOVERING" or now["generation"] > before,
        "the generation change",
    )
    site.signal([second], signal.SIGKILL)


def _kill(role: str, count: int = 1) -> Fault:
    return lambda site: site.signal(site.names(role, count), signal.SIGKILL)


def _stop(role: str) -> Fault:
    return lambda site: site.signal(site.names(role), signal.SIGSTOP)


def forget_start(site: Site) -> None:
    """Let the controller forget how a start kept the machine busy."""
    time.sleep(_FORGET_S)


def _lose(role: str) -> Fault:
    """Kill a worker; returns when the others have gone on, before another one joins."""

    def prepare(site: Site) -> None:
        before = site.snapshot()["generation"]
        _kill(role)(site)
        wait(lambda: site.snapshot()["generation"] > before, "the others to go on")

    return prepare


def _kill_both(site: Site) -> None:
    names = site.names("expert")
    site.kill_controller()
    with contextlib.suppress(ProcessLookupError):
        site.signal(names, signal.SIGKILL)


def _drain(role: str) -> Fault:
    return lambda site: site.drain(site.names(role)[0])


def _freeze_and_kill(site: Site) -> None:
    """A worker dies while the controller stands still."""
    snapshot = site.snapshot()
    (name,) = site.names("expert")
    (pid,) = (int(w["pid"]) for w in snapshot["workers"] if w["name"] == name)
    site.freeze_controller(FREEZE_S)
    os.kill(pid, signal.SIGKILL)


def _change_and_kill(site: Site) -> None:
    site.change_checkpoint()
    site.signal(site.names("expert"), signal.SIGKILL)


def _wait_refused(site: Site) -> None:
    """The worker in the place of the lost one has read other data."""
    wait(
        lambda: any("checkpoint" in worker["reason"] for worker in site.snapshot()["workers"]),
        "the refusal of a worker with other data",
    )


def _restart_at(frame: type[ControlFrame], *, is_sent: bool = False) -> Fault:
    """Rebalance; the controller dies when a worker gets or sends a frame."""

    def fault(site: Site) -> None:
        before = site.snapshot()["term"]
        site.arm(frame.__name__, is_sent)
        ordered_at = 0.0

        def has_restarted() -> bool:
            """A rebalancing may turn out to move nothing: it has no such frame."""
            nonlocal ordered_at
            if site.snapshot()["term"] > before:
                return True
            if time.monotonic() >= ordered_at + _ORDER_AGAIN_S:
                site.rebalance()
                ordered_at = time.monotonic()
            return False

        wait(has_restarted, f"a restart at {frame.__name__}")

    return fault


def _epoch_row(name: str, phase: str, fault: Fault) -> Row:
    """A row in which the controller dies in a phase of a rebalancing."""
    return Row(
        name=name,
        text=f"`kill -9` the controller in a rebalancing: {phase} (1 + 3)",
        limit="worst 1 s",
        attention=1,
        experts=3,
        redundant=22,
        sections={
            # a short look at the load differs from the one before: there is something to move
            "load": LoadSection(report_s=0.1, window_s=0.3, half_life_s=0.3),
            "rebalance": RebalanceSection(
                horizon_s=1e5, max_move_fraction=0.25, slot_cost_pairs=0.0, bytes_per_s=2e6
            ),
        },
        classes=PHASE_CLASSES,
        fault=fault,
        changes="term",
    )


_FROZEN = f"0.5 / {DETECTION_LIMIT_S + 0.5:g} s"
ROWS = (
    Row(
        name="expert-copies",
        text="`kill -9` an expert worker, copies elsewhere (1 + 3)",
        limit="0.1 / 0.5 s",
        attention=1,
        experts=3,
        redundant=22,
        fault=_kill("expert"),
    ),
    Row(
        name="expert-only",
        text="`kill -9` an expert worker with the only copies (1 + 2)",
        limit="1 / 3 s",
        attention=1,
        experts=2,
        fault=_kill("expert"),
    ),
    Row(
        name="two-experts",
        text="`kill -9` two expert workers at once (1 + 4)",
        limit="worst 3 s",
        attention=1,
        experts=4,
        fault=_kill("expert", 2),
    ),
    Row(
        name="during-change",
        text="`kill -9` a second expert worker during the generation change (1 + 4)",
        limit="worst 3 s",
        attention=1,
        experts=4,
        fault=_kill_during_change,
    ),
    Row(
        name="attention",
        text="`kill -9` an attention worker (2 + 2)",
        limit="0.5 / 2 s",
        attention=2,
        experts=2,
        fault=_kill("attention"),
    ),
    Row(
        name="stop-expert",
        text="`SIGSTOP` of an expert worker, copies elsewhere (1 + 3)",
        limit=_FROZEN,
        attention=1,
        experts=3,
        redundant=22,
        fault=_stop("expert"),
        prepare=forget_start,
    ),
    Row(
        name="stop-attention",
        text="`SIGSTOP` of an attention worker (2 + 2)",
        limit=_FROZEN,
        attention=2,
        experts=2,
        fault=_stop("attention"),
        prepare=forget_start,
    ),
    Row(
        name="controller",
        text="`kill -9` the controller (1 + 2)",
        limit="none",
        attention=1,
        experts=2,
        fault=Site.kill_controller,
        changes="term",
    ),
    Row(
        name="controller-expert",
        text="`kill -9` the controller and an expert worker, copies elsewhere (1 + 3)",
        limit="worst 5 s",
        attention=1,
        experts=3,
        redundant=22,
        fault=_kill_both,
    ),
    Row(
        name="gateway",
        text="`kill -9` a gateway of two, streams of the other (1 + 2)",
        limit="none",
        attention=1,
        experts=2,
        prepare=Site.start_second_gateway,
        fault=Site.kill_second_gateway,
        changes="",
    ),
    Row(
        name="drain-attention",
        text="drain an attention worker (2 + 2)",
        limit="-",
        attention=2,
        experts=2,
        fault=_drain("attention"),
    ),
    Row(
        name="drain-expert",
        text="drain an expert worker with the only copies (1 + 2)",
        limit="-",
        attention=1,
        experts=2,
        fault=_drain("expert"),
    ),
    Row(
        name="join-expert",
        text="an expert worker joins, in the place of a killed one (1 + 3)",
        limit="a step",
        attention=1,
        experts=3,
        redundant=22,
        prepare=_lose("expert"),
        fault=_nothing,
    ),
    Row(
        name="join-attention",
        text="an attention worker joins, in the place of a killed one (2 + 2)",
        limit="a step",
        attention=2,
        experts=2,
        prepare=_lose("attention"),
        fault=_nothing,
    ),
    Row(
        name="frozen-controller",
        text=f"`SIGSTOP` the controller for {FREEZE_S:g} s, `kill -9` an expert worker (1 + 3)",
        limit=f"worst {FREEZE_S + _AFTER_S:g} s",
        attention=1,
        experts=3,
        redundant=22,
        fault=_freeze_and_kill,
    ),
    Row(
        name="checkpoint",
        text="the checkpoint changed in place, then `kill -9` an expert worker (1 + 3)",
        limit="worst 0.5 s",
        attention=1,
        experts=3,
        redundant=22,
        fault=_change_and_kill,
        after=_wait_refused,
    ),
    _epoch_row("epoch-ordered", "commands sent", _restart_at(LoadExperts)),
    _epoch_row("epoch-loaded", "weights loading", _restart_at(ExpertsLoaded, is_sent=True)),
    _epoch_row("epoch-announced", "placement sent", _restart_at(NewEpoch)),
    _epoch_row("epoch-activated", "epoch activated", _restart_at(SwitchEpoch)),
    _epoch_row("epoch-switched", "workers switched", _restart_at(EpochSwitched, is_sent=True)),
)
"""In the order of the table."""
