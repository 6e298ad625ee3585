"""Workers are drained while streams are under way: no request fails, no token differs."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.checkpoints.random_checkpoint import TINY, write
from benchmarks.faults.layouts import row_config
from benchmarks.harness.cluster_gateway import LIMIT_S, gateway_of
from benchmarks.harness.mixed_calls import make_calls
from benchmarks.harness.serving_cluster import (
    RayCluster,
    ServingCluster,
    ThreadCluster,
    connected_ray,
    serving,
)
from benchmarks.harness.stalls import heartbeat
from gateway.calls.answer import collect
from gateway.calls.gateway import Gateway, new_call_id
from gateway.core.call import CallKind, GenerateCall
from gateway.core.delta import TokenText
from gateway.engines import request_mover
from tests.harness.fault_rows import (
    FULL,
    SMALL,
    Form,
    blocks_held,
    check_answers,
    play,
    quiet_config,
    undisturbed,
    wait_operation,
    with_model,
)
from tests.harness.tiers import quick_rows
from workers.requests.sequence import SequenceState
from workers.scheduling.scheduler import Scheduler
from workers.scheduling.step_intent import StepIntent


def begin_drain(cluster: ServingCluster, worker: str, limit_s: float = 120.0) -> dict[str, Any]:
    """Order a drain; the operation."""
    operation: dict[str, Any] = cluster.call(
        "begin", "drain", {"worker": worker, "limit_s": limit_s}
    )
    return operation


def drain(cluster: ServingCluster, worker: str) -> dict[str, Any]:
    """Drain a worker; the operation, which must succeed."""
    cluster.snapshot(fresh=True)  # so that it knows of the requests that are to be moved
    operation = wait_operation(cluster, begin_drain(cluster, worker)["id"])
    assert operation["state"] == "SUCCEEDED", operation
    assert cluster.worker(worker)["state"] == "DRAINED"
    return operation


@pytest.fixture(scope="module")
def recurrent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose streams have recurrent states, with the bundled tokenizer."""
    return write(replace(TINY, family="qwen3_next", layers=4), tmp_path_factory.mktemp("recurrent"))


def test_drained_workers_leave_no_trace_in_the_answers() -> None:
    """One of each pool, under load, one after the other."""
    with serving(ThreadCluster(quiet_config(2, 3, num_redundant=22))) as cluster:
        done: list[dict[str, Any]] = []

        def fault() -> None:
            done.append(drain(cluster, "attention-0"))
            done.append(drain(cluster, "expert-1"))

        play(cluster, SMALL, random.Random(5), fault)
        assert done[0]["result"]["requests_moved"] > 0
        assert 1 < done[0]["generation"] < done[1]["generation"]
        causes = [entry["cause"] for entry in cluster.snapshot()["history"]]
        assert [c for c in causes if c.startswith("drained")] == [
            f"drained attention-0 ({done[0]['id']})",
            f"drained expert-1 ({done[1]['id']})",
        ]
        assert not [c for c in causes if c.startswith("lost")]
        assert isinstance(cluster, ThreadCluster)
        assert not {"attention-0", "expert-1"} & set(cluster.group.workers)


@pytest.mark.parametrize("has_states", quick_rows({False}, [False, True]))
def test_a_stream_that_moves_between_idle_workers_lacks_one_token(
    monkeypatch: pytest.MonkeyPatch, recurrent: Path, has_states: bool
) -> None:
    """Its worker stands still with the last block, and the other one goes on with a decode."""
    admitted: list[SequenceState] = []
    admit_ready = Scheduler._admit_ready

    def spy(scheduler: Scheduler, intent: StepIntent, decode_rows: int) -> list[SequenceState]:
        ready = admit_ready(scheduler, intent, decode_rows)
        admitted.extend(ready)
        return ready

    monkeypatch.setattr(Scheduler, "_admit_ready", spy)
    for limit in ("_ANSWER_LIMIT_S", "_BLOCK_LIMIT_S", "_PAUSE_LIMIT_S"):  # on a busy machine, too
        monkeypatch.setattr(request_mover, limit, LIMIT_S)
    calls = make_calls(1, 800)  # so that it runs on while the order goes its way
    config = quiet_config(2, 1)
    with (
        serving(ThreadCluster(with_model(config, recurrent) if has_states else config)) as cluster,
        gateway_of(cluster) as gateway,
    ):
        expected = gateway.answer(calls)
        streams = gateway.stream(calls, "moved")
        streams.wait_tokens(1)
        (worker,) = (c.worker for c in gateway.engines.clients if c.submissions)
        began = time.monotonic()
        drain(cluster, worker)
        check_answers(streams.finish(), expected)
    if heartbeat().stalled_s(began) and not admitted:
        return  # other work of the machine came between the block and the pause: more tokens lacked
    (moved,) = set(admitted)  # again, where the new generation interrupts the step
    assert moved.request.attempt == 1
    known = len(moved.request.prompt) + len(moved.request.output_so_far[0])
    assert known % config.engine.block_size_tokens == 1


@pytest.mark.slow
def test_a_beam_search_begins_anew_at_another_worker() -> None:
    """None of its output is known before its end: only its prompt can move."""
    search = GenerateCall(
        kind=CallKind.COMPLETION,
        prompts=(tuple(range(20, 90)),),
        use_beam_search=True,
        n=3,
        max_tokens=1500,
        ignore_eos=True,
        logprobs=1,
    )

    async def answer(core: Gateway) -> list[tuple[tuple[TokenText, ...], float | None]]:
        with await core.start(search, new_call_id(search.kind)) as generation:
            choices = await collect(generation)
        return [(one.tokens, one.finish.beam_score if one.finish else None) for one in choices]

    with (
        serving(ThreadCluster(quiet_config(2, 1))) as cluster,
        gateway_of(cluster) as gateway,
        ThreadPoolExecutor(1) as pool,
    ):
        expected = gateway.run(answer(gateway.gateway))
        assert len(expected) == 3
        moved = pool.submit(gateway.run, answer(gateway.gateway))
        cluster.wait(lambda snapshot: num_running(snapshot) == 3, fresh=True)
        (worker,) = (c.worker for c in gateway.engines.clients if c.submissions)
        drain(cluster, worker)
        assert moved.result(LIMIT_S) == expected
        assert gateway.num_resubmitted == 1


def num_running(snapshot: Mapping[str, Any]) -> int:
    """Sequences that run on all workers."""
    workers = snapshot["workers"]
    return int(sum(worker["stats"].get("num_requests_running", 0) for worker in workers))


def test_streams_with_recurrent_states_move(recurrent: Path) -> None:
    config = with_model(quiet_config(2, 1), recurrent)
    with serving(ThreadCluster(config)) as cluster:
        done: list[dict[str, Any]] = []

        def fault() -> None:
            done.append(drain(cluster, "attention-0"))

        play(cluster, SMALL, random.Random(6), fault, recurrent)
        assert done[0]["result"]["requests_moved"] > 0


@pytest.mark.slow
def test_a_drain_goes_on_when_the_controller_dies() -> None:
    """A worker of each pool; no request fails, none is moved twice."""
    cluster = ThreadCluster(quiet_config(2, 3))
    done: list[dict[str, Any]] = []
    with serving(cluster):

        def fault() -> None:
            for worker in ("attention-0", "expert-1"):
                begun = begin_drain(cluster, worker)
                cluster.crash_controller()
                cluster.restore()
                done.append(wait_operation(cluster, begun["id"]))

        play(cluster, SMALL, random.Random(8), fault)
        assert [operation["state"] for operation in done] == ["SUCCEEDED"] * 2, done
        snapshot = cluster.wait(lambda s: s["state"] == "SERVING")
        states = {w["name"]: w["state"] for w in snapshot["workers"]}
        assert (states["attention-0"], states["expert-1"]) == ("DRAINED", "DRAINED")
        assert (states["attention-0.2"], states["expert-1.2"]) == ("SERVING", "SERVING")
        assert snapshot["term"] == 3
        assert not [e for e in snapshot["history"] if e["cause"].startswith("lost")]


LAYOUTS = (
    pytest.param({}, "expert-1", id="sockets"),
    pytest.param({"transport": "collective"}, "expert-1", id="collective", marks=pytest.mark.slow),
    pytest.param({"mode": "colocated"}, "colocated-1", id="colocated", marks=pytest.mark.slow),
)


@pytest.mark.parametrize(("layout", "worker"), LAYOUTS)
def test_only_copies_are_read_by_others_first(layout: dict[str, Any], worker: str) -> None:
    """Two workers with experts and no spare slot: one takes all over, from the other's memory."""
    with serving(ThreadCluster(quiet_config(1, 2, **layout))) as cluster:
        done: list[dict[str, Any]] = []
        play(cluster, SMALL, random.Random(7), lambda: done.append(drain(cluster, worker)))
        assert done[0]["result"]["experts_copied"] == 32 * len(cluster.call("placement")["banks"])
        assert cluster.snapshot()["experts_complete"]
        check_memory_is_freed(cluster, worker)


def check_memory_is_freed(cluster: ServingCluster, left: str) -> None:
    """When another worker is in its place, the one that stayed holds no more than at the start."""
    stayed = left.replace("-1", "-0")
    cluster.wait(lambda s: s["state"] == "SERVING")
    at_start = cluster.worker(stayed)["slots"]

    def slots(snapshot: dict[str, Any]) -> float:
        (stats,) = [w["stats"] for w in snapshot["workers"] if w["name"] == stayed]
        return float(stats["expert_worker_slots"])

    cluster.wait(lambda s: slots(s) == at_start, fresh=True)


def restart_all(cluster: ServingCluster) -> list[str]:
    """Drain every worker, one after the other, each when the last one's place is filled again."""
    names = [w["name"] for w in cluster.snapshot()["workers"]]
    for name in names:
        drain(cluster, name)
        cluster.wait(lambda s: s["state"] == "SERVING")
    return names


def roll(cluster: ServingCluster, form: Form) -> None:
    """A rolling restart; clients ask again and again until it is done, and notice nothing."""
    expected = undisturbed(form)
    calls = make_calls(form.num_streams, form.num_tokens)
    with ThreadPoolExecutor(1) as pool, gateway_of(cluster) as gateway:
        restart: Future[list[str]] | None = None
        rounds = 0
        while restart is None or not restart.done():
            streams = gateway.stream(calls, f"round-{rounds}")
            streams.wait_tokens(form.num_streams)
            restart = restart or pool.submit(restart_all, cluster)
            check_answers(streams.finish(), expected)
            rounds += 1
        drained = restart.result()
        check_answers(gateway.stream(calls, "after").finish(), expected)
    workers = {w["name"]: w for w in cluster.snapshot()["workers"]}
    assert {workers[name]["state"] for name in drained} == {"DRAINED"}
    serving = [w for w in workers.values() if w["state"] == "SERVING"]
    assert len(serving) == len(drained)
    assert {w["role"] for w in serving} == {"attention", "expert"}
    assert not {w["name"] for w in serving} & set(drained)
    cluster.wait(lambda snapshot: blocks_held(snapshot) == 0, fresh=True)  # a fetch may still end


@pytest.mark.slow
def test_a_rolling_restart_of_every_worker() -> None:
    with serving(ThreadCluster(quiet_config(2, 2))) as cluster:
        roll(cluster, SMALL)


@pytest.mark.ray
@pytest.mark.slow
def test_a_rolling_restart_of_every_actor() -> None:
    with connected_ray(), serving(RayCluster(row_config(2, 3))) as cluster:
        roll(cluster, FULL)
