"""The controller dies: the workers go on, and the next controller learns the cluster from them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from benchmarks.faults.layouts import DETECTION_LIMIT_S
from benchmarks.harness.engine_stream import EngineStream, Result
from benchmarks.harness.serving_cluster import QUIET_S, ThreadCluster, make_config, serving
from benchmarks.harness.stalls import wait_until
from cluster.core.errors import SupersededError
from workers.requests.request import Request, SamplingParams

NUM_TOKENS = 64


def requests(prefix: str, num_tokens: int = NUM_TOKENS) -> list[Request]:
    """Eight, greedy and sampled."""
    return [
        Request(
            request_id=f"{prefix}-{i}",
            prompt=tuple(range(3, 6 + i)),
            params=SamplingParams(
                max_tokens=num_tokens, ignore_eos=True, seed=i, temperature=float(i % 2)
            ),
        )
        for i in range(8)
    ]


def cluster_of(
    checkpoint: Path, detection_limit_s: float = QUIET_S, is_alone: bool = False
) -> ThreadCluster:
    """One attention and two expert workers that each hold every expert; or one worker alone."""
    config = make_config(
        checkpoint,
        1,
        2,
        workers={"mode": "local"} if is_alone else {"num_redundant_experts": 8},
        engine={"deterministic": "on"},
        transport={"detection_limit_s": detection_limit_s},
    )
    return ThreadCluster(config)


def same_beginnings(calm: dict[str, Result], hit: dict[str, Result]) -> bool:
    """The longer results begin with the shorter ones, token for token."""
    pairs = zip(calm.values(), hit.values(), strict=True)
    return all(h.tokens[0][: len(c.tokens[0])] == c.tokens[0] for c, h in pairs)


def steps(cluster: ThreadCluster) -> int:
    """Highest step that the attention worker has seen."""
    return cluster.group.workers["attention-0"].membership._channel.highest_step


class Amid(NamedTuple):
    """Requests that run."""

    stream: EngineStream
    calm: dict[str, Result]
    """Shorter answers to the same requests."""
    asked: list[Request]


def amid_requests(cluster: ThreadCluster) -> Amid:
    stream = cluster.stream()
    calm = stream.finish(requests("calm"))
    asked = requests("hit", 200)
    for request in asked:
        stream.send(request)
    stream.put_back([stream.next() for _ in range(16)])
    return Amid(stream, calm, asked)


def crash_amid_requests(cluster: ThreadCluster) -> Amid:
    found = amid_requests(cluster)
    cluster.crash_controller()
    return found


def test_streams_do_not_notice_a_restarted_controller(tiny_checkpoint: Path) -> None:
    cluster = cluster_of(tiny_checkpoint)
    with serving(cluster):
        stream, calm, asked = crash_amid_requests(cluster)
        cluster.restore()
        snapshot = cluster.snapshot()
        results = stream.collect(asked)
        assert (snapshot["state"], snapshot["generation"], snapshot["term"]) == ("SERVING", 1, 2)
        assert [w["state"] for w in snapshot["workers"]] == ["SERVING"] * 3
        causes = [entry["cause"] for entry in snapshot["history"]]
        assert causes == ["start", "the controller was restarted"]
        assert same_beginnings(calm, results)
        assert same_beginnings(calm, stream.finish(requests("again")))
        assert cluster.blocks_in_use() == 0
        assert cluster.snapshot()["model"]["max_model_len"] == 256
        cluster.crash_controller()
        cluster.restore()
        assert cluster.snapshot()["term"] == 3
        stream.close()


def test_a_broken_control_connection_costs_no_worker(tiny_checkpoint: Path) -> None:
    """The worker calls again, and the controller ends: Ray restarts it."""
    cluster = cluster_of(tiny_checkpoint)
    with serving(cluster):
        stream, calm, asked = amid_requests(cluster)
        cluster.break_connection("expert-0")
        wait_until(lambda: cluster.group.has_ended_controller, "the end of the controller")
        cluster.crash_controller()
        cluster.restore()
        results = stream.collect(asked)
        snapshot = cluster.snapshot()
        assert (snapshot["state"], snapshot["generation"], snapshot["term"]) == ("SERVING", 1, 2)
        assert [w["state"] for w in snapshot["workers"]] == ["SERVING"] * 3
        assert same_beginnings(calm, results)
        stream.close()


def test_a_controller_that_was_overtaken_takes_no_worker_back(tiny_checkpoint: Path) -> None:
    """It stood still between its claim and its calls of the workers."""
    cluster = cluster_of(tiny_checkpoint)
    with serving(cluster):
        cluster.crash_controller()
        cluster.restore()
        worker = cluster.group.workers["expert-0"]
        with pytest.raises(SupersededError, match="older term 1"):
            worker.control.redirect("127.0.0.1:1", 1, "the first controller")
        cluster.wait(lambda s: s["state"] == "SERVING")
        server = cluster.actor.runner.server
        assert server is not None
        assert server.is_connected("expert-0")


def test_a_worker_that_dies_with_the_controller_is_found_missing(tiny_checkpoint: Path) -> None:
    cluster = cluster_of(tiny_checkpoint)
    with serving(cluster):
        stream, calm, asked = crash_amid_requests(cluster)
        cluster.group.workers["expert-1"].stop()
        cluster.restore()
        results = stream.collect(asked)
        snapshot = cluster.wait(lambda s: s["generation"] >= 3 and s["state"] == "SERVING")
        assert (snapshot["generation"], snapshot["placement_epoch"]) == (3, 3)
        assert same_beginnings(calm, results)
        assert cluster.blocks_in_use() == 0
        cluster.crash_controller()
        cluster.restore()
        again = cluster.snapshot()
        assert (again["state"], again["generation"]) == ("SERVING", 3)
        assert again["history"][:-1] == snapshot["history"]
        lost = [w for w in again["workers"] if w["state"] == "LOST"]
        assert [w["name"] for w in lost] == ["expert-1"]
        assert lost[0]["reason"] == cluster.worker("expert-1")["reason"] != ""
        stream.close()


@pytest.mark.slow
@pytest.mark.parametrize("is_alone", [False, True], ids=["with experts", "alone"])
def test_an_idle_cluster_waits_for_its_controller_without_being_fenced(
    tiny_checkpoint: Path, is_alone: bool
) -> None:
    cluster = cluster_of(tiny_checkpoint, DETECTION_LIMIT_S, is_alone)
    with serving(cluster):
        stream = cluster.stream()
        calm = stream.finish(requests("calm"))
        cluster.crash_controller()
        before = steps(cluster)
        # a quarter of the lease each, or more
        wait_until(lambda: steps(cluster) >= before + 5, "steps without a controller")
        again = stream.finish(requests("alone"))
        assert same_beginnings(calm, again)
        cluster.restore()
        assert cluster.snapshot()["generation"] == 1
        assert same_beginnings(calm, stream.finish(requests("again")))
        stream.close()


def test_an_isolated_worker_stops_by_itself_until_it_is_called(
    tiny_checkpoint: Path,
) -> None:
    """Neither a controller nor the experts: its lease runs out, and its streams are closed."""
    cluster = cluster_of(tiny_checkpoint, DETECTION_LIMIT_S)
    with serving(cluster):
        stream = cluster.stream()
        calm = stream.finish(requests("calm"))
        address = cluster.worker("attention-0")["engine_address"]
        cluster.crash_controller()
        for name in ("expert-0", "expert-1"):
            cluster.group.workers[name].control._fence("for this test")  # it runs no further step
        stream.send(requests("hit")[0])
        stream.wait_ended()
        refused = EngineStream(address)
        with pytest.raises(ConnectionError, match="this worker may not serve now"):
            refused.next()
        cluster.restore()
        snapshot = cluster.wait(lambda s: s["generation"] == 2 and s["state"] == "SERVING")
        assert snapshot["history"][-1]["cause"] == "the controller was restarted"
        stream = cluster.stream()
        assert same_beginnings(calm, stream.finish(requests("again")))
        assert cluster.blocks_in_use() == 0
        stream.close()
