"""The rows of the table of faults: a fault at a random moment of streams, no client notices.

    cluster = RayCluster(row_config(1, 3, num_redundant=22))
    with serving(cluster):
        draw = random.Random(1)
        play_until(cluster, SMALL, draw, lambda: kill_any(cluster, "expert", draw), was_retried)
        whole(cluster)

``play`` serves a mix of calls (greedy, sampled with seeds, penalties, stop strings, grammars)
through a real gateway, waits until a random share of the tokens has come, does the fault, and
compares what every client got with an undisturbed run: texts, token ids, logprobs, ends. Clusters
compute ``--deterministic``, so that the undisturbed run may be one of another layout.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.faults.layouts import row_config
from benchmarks.harness.cluster_gateway import Answer, gateway_of
from benchmarks.harness.mixed_calls import make_calls
from benchmarks.harness.serving_cluster import (
    QUIET_S,
    ServingCluster,
    ThreadCluster,
    serving,
)
from benchmarks.harness.stalls import heartbeat, wait_until
from cluster.config.cluster import ClusterConfig
from cluster.config.model import Quantize, QuantizeLayers
from cluster.config.transport import TransportSection
from workers.requests.request import FinishReason


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """How much is under way."""

    num_streams: int
    """Calls at the same time."""
    num_tokens: int
    """Fewest tokens of each."""


SMALL = Form(num_streams=8, num_tokens=64)
FULL = Form(num_streams=24, num_tokens=200)
FORMS = (
    pytest.param(SMALL, id="small"),
    pytest.param(FULL, id="full", marks=pytest.mark.slow),
)
"""For ``pytest.mark.parametrize("form", FORMS)``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Played:
    """What a row showed beside its answers."""

    num_retried: float
    """Steps that were begun, given up and run again, on workers that live."""
    num_resubmitted: int
    """Requests that went on at another attention worker."""
    stall_s: float
    """Longest time after the fault in which a stream got nothing; ``play`` limits it."""
    is_calm: bool
    """The machine never stood still for long enough to make a living worker look dead."""


RECOVERY_LIMIT_S = 13.0
"""Longest time from the detection of a fault to the next tokens, on a machine that runs."""
_NUM_TRIES = 8
_STUCK_S = 3.0
"""Time without a committed step, of some heartbeats, after which one waits for a frozen worker."""


quiet_config = partial(row_config, detection_limit_s=QUIET_S)
"""For clusters of threads, where one stall silences all workers, and faults that are no silence."""


def with_model(config: ClusterConfig, model: Path) -> ClusterConfig:
    """The same with another model."""
    return replace(config, model=replace(config.model, path=str(model)))


def with_quantized(
    config: ClusterConfig, quantize: Quantize, layers: QuantizeLayers = "experts"
) -> ClusterConfig:
    """The same with quantized weights, as in ``ModelSection``."""
    model = replace(config.model, quantize=quantize, quantize_layers=layers)
    return replace(config, model=model)


@cache
def undisturbed(
    form: Form,
    model: Path | None = None,
    quantize: Quantize = "auto",
    layers: QuantizeLayers = "experts",
) -> tuple[Answer, ...]:
    """What the calls of a form get where nothing happens; of the bundled model unless given."""
    config = with_quantized(quiet_config(1, 1), quantize, layers)
    cluster = ThreadCluster(config if model is None else with_model(config, model))
    with serving(cluster), gateway_of(cluster) as gateway:
        return tuple(gateway.answer(make_calls(form.num_streams, form.num_tokens)))


def play(
    cluster: ServingCluster,
    form: Form,
    draw: random.Random,
    fault: Callable[[], object],
    model: Path | None = None,
) -> Played:
    """See the module. ``cluster`` serves already, and stays; ``fault`` is called from this thread.
    ``model``: the cluster's, if it is not the bundled one.

    Fails when an answer differs, a call fails, a stream stalls for too long, or a worker that
    lives holds KV blocks afterwards.
    """
    own = cluster.config.model
    expected = undisturbed(form, model, own.quantize, own.quantize_layers)
    before, began, shown = num_abandoned(cluster), time.monotonic(), [cluster.snapshot()]
    with gateway_of(cluster) as gateway:
        streams = gateway.stream(make_calls(form.num_streams, form.num_tokens))
        total = form.num_streams * form.num_tokens
        streams.wait_tokens(draw.randrange(total // 8, total * 3 // 4))
        hit_at = time.monotonic()
        fault()
        check_answers(streams.finish(), expected)
        stall_s = longest_gap(streams.answers, hit_at)
        check_stall(stall_s, heartbeat().stalled_s(hit_at), cluster.config)
        shown.append(cluster.wait(lambda snapshot: blocks_held(snapshot) == 0, fresh=True))
    limit_s = min(calm_limit_s(snapshot, cluster.config.transport) for snapshot in shown)
    return Played(
        num_retried=num_abandoned(cluster) - before,
        num_resubmitted=gateway.num_resubmitted,
        stall_s=stall_s,
        is_calm=heartbeat().longest_gap_s(began) < limit_s,
    )


def calm_limit_s(snapshot: Mapping[str, Any], transport: TransportSection) -> float:
    """A machine that stands still for less makes no living worker look dead: signs of life that
    were due when it stopped come in time, and so do heartbeats, which show the loop's progress.
    """
    limit_s = transport.detection_limit_s
    serving = (w for w in snapshot["workers"] if w["state"] == "SERVING")
    silence_s = min((w["patience_s"] or limit_s for w in serving), default=limit_s)
    return min(silence_s - transport.alive_s, limit_s - transport.heartbeat_s)


def play_until(
    cluster: ServingCluster,
    form: Form,
    draw: random.Random,
    fault: Callable[[], object],
    is_hit: Callable[[Played], bool],
    model: Path | None = None,
) -> None:
    """``play``, again when the fault disturbed nothing: it fell between two steps, or this process
    did not run before the streams had ended.

    Each time the cluster is whole again before.
    """
    for _ in range(_NUM_TRIES):
        whole(cluster)
        if is_hit(play(cluster, form, draw, fault, model)):
            return
    raise AssertionError("the fault disturbed nothing")


def was_retried(played: Played) -> bool:
    """A step was run again."""
    return played.num_retried > 0


def was_disturbed(played: Played) -> bool:
    """A step was run again, or a request went on at another worker."""
    return was_retried(played) or played.num_resubmitted > 0


def kill(cluster: ServingCluster, name: str) -> None:
    """``kill -9`` of a worker of a ``RayCluster``."""
    os.kill(cluster.worker(name)["pid"], signal.SIGKILL)


def kill_in_a_step(cluster: ServingCluster, name: str) -> None:
    """``kill -9`` of a worker that a step waits for: it is stopped before, and no step ends."""
    pid = cluster.worker(name)["pid"]
    os.kill(pid, signal.SIGSTOP)
    known, since = num_steps(cluster), time.monotonic()
    while time.monotonic() - since < _STUCK_S:
        cluster.call("wait_snapshot", cluster.snapshot()["version"], _STUCK_S / 10)
        if (now := num_steps(cluster)) != known:
            known, since = now, time.monotonic()
    os.kill(pid, signal.SIGKILL)


def num_steps(cluster: ServingCluster) -> float:
    """Steps that were committed, by the last heartbeats."""
    return sum(float(w["stats"].get("steps_total", 0.0)) for w in cluster.snapshot()["workers"])


def kill_any(cluster: ServingCluster, role: str, draw: random.Random, count: int = 1) -> None:
    """``kill -9`` of some serving workers of a role, at the same moment."""
    found = [
        w["name"]
        for w in cluster.snapshot()["workers"]
        if w["role"] == role and w["state"] == "SERVING"
    ]
    for name in draw.sample(sorted(found), count):
        kill(cluster, name)


def whole(cluster: ServingCluster) -> dict[str, Any]:
    """The cluster becomes whole, with every copy in its place, and no step waits; what it says."""
    snapshot = cluster.wait(lambda s: s["state"] == "SERVING" and not s["late_workers"])
    assert snapshot["problems"] == [], snapshot["problems"]
    assert snapshot["experts_complete"]
    serving_now = [w for w in snapshot["workers"] if w["state"] == "SERVING"]
    assert len(serving_now) == len({(w["role"], w["rank"]) for w in snapshot["workers"]})
    assert {w["state"] for w in snapshot["workers"]} <= {"SERVING", "LOST", "DRAINED"}
    return snapshot


def serving_name(cluster: ServingCluster, role: str, rank: int) -> str:
    """The worker that serves in a place; its first one may have been lost."""
    (name,) = (
        str(w["name"])
        for w in cluster.snapshot()["workers"]
        if (w["role"], w["rank"], w["state"]) == (role, rank, "SERVING")
    )
    return name


def entries_since(before: dict[str, Any], after: dict[str, Any]) -> list[dict[str, Any]]:
    """History of ``after`` beyond the generation of ``before``."""
    return [e for e in after["history"] if e["generation"] > before["generation"]]


def wait_operation(cluster: ServingCluster, operation_id: str) -> dict[str, Any]:
    """An operation once it has ended."""
    found: list[dict[str, Any]] = []

    def has_ended() -> bool:
        found[:] = [cluster.call("operation", operation_id)]
        return bool(found[0]["state"] != "RUNNING")

    wait_until(has_ended, f"the end of operation {operation_id}")
    return found[0]


def check_gone(pid: int) -> None:
    """Wait until no process of that id runs; a dead one may wait to be reaped."""

    def is_gone() -> bool:
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        return True

    wait_until(is_gone, f"the end of process {pid}")


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """SIGSTOP for the length of a ``with`` block; processes that still live then wake up."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def stop_until_lost(cluster: ServingCluster, name: str) -> None:
    """Freeze a worker of a ``RayCluster`` until it is declared lost; then it wakes up."""
    with stopped(cluster.worker(name)["pid"]):
        cluster.wait(lambda s: state_of(s, name) == "LOST")


def state_of(snapshot: dict[str, Any], name: str) -> str:
    """A worker's state in a snapshot."""
    return next(str(w["state"]) for w in snapshot["workers"] if w["name"] == name)


def check_answers(found: Sequence[Answer], expected: Sequence[Answer]) -> None:
    """Every client got the same, to the last bit of the logprobs."""
    for i, (mine, other) in enumerate(zip(found, expected, strict=True)):
        assert mine.text == other.text, f"call {i}"
        assert mine == other, f"call {i}"
        assert all(token.logprob is not None for token in mine.tokens)
    assert {answer.reason for answer in found} <= {FinishReason.STOP, FinishReason.LENGTH}


def blocks_held(snapshot: dict[str, Any]) -> int:
    """KV blocks with a holder, on all workers that are not lost."""
    return sum(
        w["kv_blocks_total"] - w["kv_blocks_free"]
        for w in snapshot["workers"]
        if w["kv_blocks_total"] and w["state"] in ("READY", "SERVING")
    )


def num_abandoned(cluster: ServingCluster) -> float:
    """Steps that were begun and given up, on all workers that are not lost."""
    return sum(
        float(w["stats"].get("steps_abandoned_total", 0.0))
        for w in cluster.snapshot(fresh=True)["workers"]
        if w["state"] in ("READY", "SERVING")
    )


def check_stall(stall_s: float, stood_still_s: float, config: ClusterConfig) -> None:
    """The streams went on in time; ``stood_still_s`` of the machine do not count."""
    limit_s = config.transport.detection_limit_s + RECOVERY_LIMIT_S
    assert stall_s <= limit_s + stood_still_s, (
        f"a stream stood still for {stall_s:.1f} s, and the machine for {stood_still_s:.1f} s: "
        f"the limit is {limit_s:.1f} s"
    )


def longest_gap(answers: Sequence[Answer], since: float) -> float:
    """Longest time in which a stream that ends after ``since`` got nothing, seconds.

    All streams have begun before ``since``.
    """
    return max(
        (
            later - max(earlier, since)
            for answer in answers
            for earlier, later in zip([since, *answer.times], answer.times, strict=False)
            if later > since
        ),
        default=0.0,
    )
