"""Experts follow the load while the cluster serves: no request fails, and no text changes.

Requests of one domain choose other experts than those of another (``domain_checkpoint``),
so that the best placement changes whenever the domain does.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.checkpoints.domain_checkpoint import DomainModel, write
from benchmarks.harness.engine_stream import EngineStream, Result
from benchmarks.harness.serving_cluster import (
    RayCluster,
    ServingCluster,
    ThreadCluster,
    connected_ray,
    make_config,
    serving,
)
from benchmarks.harness.stalls import Limit
from cluster.config.cluster import ClusterConfig
from cluster.config.expert_load import LoadSection, RebalanceSection
from tests.harness.metric_values import decisions, metric
from workers.requests.request import FinishReason, Request, SamplingParams

MODEL = DomainModel(skew=1.3)
NUM_WORKERS = 4
LIMIT_S = 240.0
"""For what takes seconds on a quiet machine."""
SLOW = 8_000.0
"""Bytes a second: an expert (24 KB) takes three."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(MODEL, tmp_path_factory.mktemp("domains"))


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    with connected_ray():
        yield


def config(checkpoint: Path, redundant: int = 1, **rebalance: Any) -> ClusterConfig:
    """Four expert workers that rebalance at every chance, and never mind the cost."""
    plain = make_config(
        checkpoint,
        1,
        NUM_WORKERS,
        workers={"num_redundant_experts": redundant, "recovery_slots": 1},
        engine={"deterministic": "on", "enable_prefix_caching": False},
    )
    eager = {"enable_eplb": True, "interval_s": 0.05, "horizon_s": 1e5, "max_move_fraction": 0.25}
    return replace(
        plain,
        load=LoadSection(report_s=0.1, window_s=0.3),
        rebalance=RebalanceSection(**{**eager, **rebalance}),
    )


def requests(domain: int, name: str, num_tokens: int) -> list[Request]:
    """The same eight each time but for the name: greedy and sampled."""
    tokens = MODEL.tokens(domain)
    return [
        Request(
            request_id=f"{name}-{domain}-{i}",
            prompt=tuple(tokens[i : 6 + 3 * i]),
            params=SamplingParams(
                max_tokens=num_tokens,
                temperature=0.0 if i == 0 else 1.0,
                top_p=0.9 if i % 3 == 2 else 1.0,
                repetition_penalty=1.1 if i % 3 == 1 else 1.0,
                seed=40 + i,
                ignore_eos=True,
            ),
        )
        for i in range(8)
    ]


class Domains:
    """Serves the requests of the domains again and again; every answer must be the first one."""

    def __init__(self, stream: EngineStream, num_tokens: int = 60) -> None:
        self._stream = stream
        self._num_tokens = num_tokens
        self._first: dict[int, list[list[int]]] = {}
        self.num_rounds = 0

    def serve(self, domain: int) -> None:
        """One round of a domain."""
        self.check(domain, self._stream.collect(self.send(domain)))

    def send(self, domain: int) -> list[Request]:
        """Begin a round; collect its answers and check them."""
        self.num_rounds += 1
        asked = requests(domain, f"round{self.num_rounds}", self._num_tokens)
        for request in asked:
            self._stream.send(request)
        return asked

    def check(self, domain: int, results: dict[str, Result]) -> None:
        texts = []
        for result in results.values():
            assert result.reasons == [FinishReason.LENGTH]
            texts.append(result.tokens[0])
        assert self._first.setdefault(domain, texts) == texts

    def serve_until(self, is_so: Callable[[], bool], domain: Callable[[int], int]) -> None:
        """Round after round, of a domain chosen by the number of the round."""
        limit = Limit(LIMIT_S)
        while not is_so():
            assert not limit.is_over(), "never so"
            self.serve(domain(self.num_rounds))


def changing(number: int) -> int:
    """Six rounds of one domain, six of the other."""
    return number // 6 % 2


def check_placement(cluster: ServingCluster) -> None:
    """Every expert has a copy, no device two of one, and none more than it has slots."""
    document = cluster.call("placement")
    assert len(document["banks"]) == MODEL.layers
    for bank in document["banks"]:
        rows = [[e for e in row if e >= 0] for row in bank["physical_to_logical"]]
        assert {e for row in rows for e in row} == set(range(MODEL.experts))
        assert all(len(set(row)) == len(row) for row in rows)


def follow(cluster: ServingCluster, num_changes: int, num_tokens: int = 60) -> dict[str, Any]:
    """Shift the load until this number of changes was made; the last snapshot."""
    stream = cluster.stream()
    domains = Domains(stream, num_tokens)

    def applied() -> int:
        check_placement(cluster)
        return decisions(cluster.snapshot()).get("applied", 0)

    domains.serve_until(lambda: applied() >= num_changes, changing)
    domains.serve(0)
    domains.serve(1)
    stream.close()
    return cluster.snapshot()


def check_followed(cluster: ServingCluster, snapshot: dict[str, Any], num_changes: int) -> None:
    outcomes = decisions(snapshot)
    if cluster.config.workers.recovery_slots:  # else there may be no slot to begin with
        assert "failed" not in outcomes
    slots_moved = metric(snapshot, "migration_slots_moved_total", reason="rebalance")
    assert slots_moved > 0
    assert metric(snapshot, "rebalance_stall_seconds_count") >= outcomes["applied"]
    num_bytes = metric(snapshot, "migration_bytes_total", reason="rebalance")
    assert num_bytes >= slots_moved * 1000
    assert snapshot["placement_epoch"] > num_changes
    assert snapshot["generation"] == 1
    assert snapshot["state"] == "SERVING"
    entries = [e for e in snapshot["history"] if e["cause"] == "rebalance"]
    done = [e for e in entries if not e["effect"].startswith("failed")]
    assert len(done) >= num_changes
    assert all("predicted" in e["effect"] for e in done)
    assert cluster.blocks_in_use() == 0


def test_experts_follow_the_load_and_no_text_changes(checkpoint: Path) -> None:
    with serving(ThreadCluster(config(checkpoint))) as cluster:
        check_followed(cluster, follow(cluster, 3), 3)


def test_spare_slots_that_are_all_taken_are_enough(checkpoint: Path) -> None:
    """No slot is free at first: copies that are to go make room for what comes."""
    full = config(checkpoint)
    full = replace(full, workers=replace(full.workers, recovery_slots=0))
    with serving(ThreadCluster(full)) as cluster:
        check_followed(cluster, follow(cluster, 2), 2)


@pytest.mark.slow
def test_colocated_workers_rebalance_too(checkpoint: Path) -> None:
    plain = config(checkpoint)
    workers = replace(plain.workers, mode="colocated", num_attention_workers=None)
    with serving(ThreadCluster(replace(plain, workers=workers))) as cluster:
        check_followed(cluster, follow(cluster, 2), 2)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(("num_changes", "num_tokens"), [(3, 60), (25, 120)], ids=["short", "long"])
def test_real_workers_follow_the_load(
    local_ray: None, checkpoint: Path, num_changes: int, num_tokens: int
) -> None:
    with serving(RayCluster(config(checkpoint))) as cluster:
        check_followed(cluster, follow(cluster, num_changes, num_tokens), num_changes)


def wait_loading(
    cluster: ServingCluster, stream: EngineStream, domains: Domains
) -> tuple[dict[str, str], int, list[Request]]:
    """Shift the load until a worker has just begun to take experts from another.

    Returns the worker and its source, and the round that is under way: its domain and requests.
    """
    limit = Limit(LIMIT_S)
    while not limit.is_over():
        domain = changing(domains.num_rounds)
        asked = domains.send(domain)
        until = time.monotonic() + 1.0
        while time.monotonic() < until:
            loading = cluster.snapshot()["rebalance"]["loading"]
            moves = [e for e in loading if e["from"] != "checkpoint"]
            if moves:
                return moves[0], domain, asked
        domains.check(domain, stream.collect(asked))
    raise TimeoutError("no move began")


def poorly_placed(config: ClusterConfig, folder: Path) -> ClusterConfig:
    """Two copies of every expert: the busy ones on two workers, the others on the other two."""
    banks = []
    for layer in range(MODEL.layers):
        counts = [0] * MODEL.experts
        for token in MODEL.tokens(0):
            for expert in MODEL.experts_of(layer, token):
                counts[expert] += 1
        order = sorted(range(MODEL.experts), key=lambda e: -counts[e])
        half = MODEL.experts // 2
        rows = [[*part, -1] for part in (order[:half], order[half:]) for _ in range(2)]
        banks.append({"bank": "mlp", "layer": layer, "physical_to_logical": rows})
    path = folder / "placement.json"
    path.write_text(json.dumps({"schema": 1, "epoch": 1, "banks": banks}))
    return replace(config, workers=replace(config.workers, placement_file=str(path)))


@pytest.mark.ray
@pytest.mark.parametrize(
    ("side", "num_tokens"),
    [
        pytest.param("worker", 60, id="destination-short", marks=pytest.mark.slow),
        pytest.param("from", 60, id="source-short", marks=pytest.mark.slow),
        pytest.param("worker", 200, id="destination-long", marks=pytest.mark.slow),
        pytest.param("from", 200, id="source-long", marks=pytest.mark.slow),
    ],
)
def test_killing_either_side_of_a_move_changes_no_text(
    local_ray: None, checkpoint: Path, tmp_path: Path, side: str, num_tokens: int
) -> None:
    """The move is given up, the survivors go on, and later changes work."""
    slow = poorly_placed(config(checkpoint, redundant=4, bytes_per_s=SLOW), tmp_path)
    with serving(RayCluster(slow)) as cluster:
        stream = cluster.stream()
        domains = Domains(stream, num_tokens)
        domains.serve(0)
        domains.serve(1)
        move, domain, under_way = wait_loading(cluster, stream, domains)
        os.kill(cluster.worker(move[side])["pid"], signal.SIGKILL)
        further = domains.send(1 - domain)
        results = stream.collect([*under_way, *further])
        for which, asked in ((domain, under_way), (1 - domain, further)):
            domains.check(which, {r.request_id: results[r.request_id] for r in asked})

        def has_given_up(snapshot: dict[str, Any]) -> bool:
            is_over = snapshot["generation"] >= 2 and snapshot["experts_complete"]
            return bool(is_over and decisions(snapshot).get("failed"))

        snapshot = cluster.wait(has_given_up)
        assert cluster.worker(move[side])["state"] == "LOST"
        before = decisions(snapshot).get("applied", 0)
        check_placement(cluster)

        def applied_again() -> bool:
            return decisions(cluster.snapshot()).get("applied", 0) > before

        domains.serve_until(applied_again, changing)
        check_placement(cluster)
        assert cluster.blocks_in_use() == 0
        stream.close()


def test_a_move_that_takes_too_long_is_given_up(checkpoint: Path) -> None:
    late = config(checkpoint, bytes_per_s=SLOW, limit_s=0.4)
    with serving(ThreadCluster(late)) as cluster:
        stream = cluster.stream()
        domains = Domains(stream)

        def given_up() -> list[str]:
            history = cluster.snapshot()["history"]
            texts = [e["effect"] for e in history if e["cause"] == "rebalance"]
            return [t for t in texts if "could not load experts within 0.4 s" in t]

        domains.serve_until(lambda: bool(given_up()), changing)
        check_placement(cluster)
        assert given_up()[0].endswith("the epoch in force stays")
        assert decisions(cluster.snapshot())["failed"]
        domains.serve(0)
        stream.close()


def test_an_idle_cluster_rebalances_on_request(checkpoint: Path, tmp_path: Path) -> None:
    """No worker has work: the switch is an empty step."""
    manual = poorly_placed(config(checkpoint, redundant=4, enable_eplb=False), tmp_path)
    with serving(ThreadCluster(manual)) as cluster:
        stream = cluster.stream()
        domains = Domains(stream)
        domains.serve(0)
        cluster.wait(lambda s: s["rebalance"]["last"] is None, fresh=True)
        planned = cluster.call("begin", "rebalance", {"dry_run": True})
        assert planned["state"] == "SUCCEEDED"
        assert planned["result"]["action"] == "move"
        assert planned["result"]["slots_to_move"] > 0
        assert cluster.snapshot()["placement_epoch"] == 1
        order = {"request_id": "mine", "expected_epoch": 1}
        operation = cluster.call("begin", "rebalance", order)
        assert cluster.call("begin", "rebalance", order)["id"] == operation["id"]
        cluster.wait(lambda s: s["rebalance"]["last"] is not None, fresh=True)
        done = cluster.call("operation", operation["id"])
        assert done["state"] == "SUCCEEDED"
        assert "filled" in done["message"]
        assert cluster.snapshot()["placement_epoch"] > 1
        check_placement(cluster)
        domains.serve(0)
        stream.close()
