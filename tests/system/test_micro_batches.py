"""Two micro-batches in flight: both pools are busy at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from benchmarks.harness.serving_cluster import ThreadCluster, make_config, serving
from benchmarks.harness.worker_processes import ProcessWorkerGroup
from cluster.launch.model_source import bundled_checkpoint
from tests.harness.golden_clusters import requests
from tests.harness.recorded_cluster import RecordedCluster
from tests.harness.step_traces import Seen, read_spans
from tests.reference.goldens import MAX_MODEL_LEN, Golden
from workers.requests.request import Request, SamplingParams

AnyGolden = Callable[[str], Golden]


@pytest.fixture(scope="module")
def spans(tmp_path_factory: pytest.TempPathFactory) -> list[Seen]:
    """What 1 + 1 worker processes write of a few requests, two micro-batches in each step."""
    folder = tmp_path_factory.mktemp("traces")
    config = make_config(
        bundled_checkpoint(),
        1,
        1,
        engine={"num_micro_batches": 2},
        observability={"trace_dir": str(folder)},
    )
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    asked = [
        Request(request_id=f"r{i}", prompt=tuple(range(10 + i, 40 + i)), params=params)
        for i in range(16)
    ]
    with serving(ThreadCluster(config, ProcessWorkerGroup())) as cluster:
        stream = cluster.stream()
        stream.finish(asked)
        stream.close()
    return read_spans(folder)


@pytest.mark.distributed
def test_a_trace_shows_both_pools_busy_at_once(spans: list[Seen]) -> None:
    """While the experts have one micro-batch, the other worker is in the other's attention.

    Whether they run at the same moment is up to the machine; that neither waits is not.
    """
    split = {s.args["step"] for s in spans if s.name == "step" and s.args["micro_batches"] == 2}
    assert len(split) >= 12
    places = {
        (s.name, s.args["step"], s.args["layer"], s.args["micro_batch"]): s
        for s in spans
        if s.args.get("step") in split and "micro_batch" in s.args
    }
    last = max(layer for _, _, layer, _ in places)
    for (name, step, layer, part), mine in places.items():
        if name != "experts":
            continue
        sent, back = (places[n, step, layer, part] for n in ("dispatch", "combine"))
        assert sent.worker == back.worker != mine.worker
        assert sent.start_us < mine.start_us < mine.end_us < back.end_us
        if part == 1 and layer == last:
            continue  # nothing is left to do
        other = places["attention", step, layer + part, 1 - part]
        assert sent.start_us < other.start_us < other.end_us < back.end_us


@pytest.mark.distributed
def test_no_worker_waits_between_two_micro_batches(spans: list[Seen]) -> None:
    """Both parts are sent before a wait for one; one reply is sent before a wait for the other."""
    starts = {
        (s.name, s.args["step"], s.args["layer"], s.args["micro_batch"]): s.start_us
        for s in spans
        if "micro_batch" in s.args
    }
    places = [place[1:3] for place in starts if place[0] == "send" and place[3] == 1]
    assert places
    for step, layer in places:
        assert starts["dispatch", step, layer, 1] < starts["combine", step, layer, 0]
        assert starts["send", step, layer, 0] < starts["receive", step, layer, 1]
        assert starts["attention", step, layer, 0] < starts["attention", step, layer, 1]


def test_colocated_workers_show_both_kinds_of_work(golden: AnyGolden, tmp_path: Path) -> None:
    """The experts are served within a combine; a worker without rows serves them all the same."""
    config = make_config(
        golden("olmoe-base").path,
        2,
        2,
        workers={"mode": "colocated"},
        observability={"trace_dir": str(tmp_path)},
        dtype="float32",
        max_model_len=MAX_MODEL_LEN,
    )
    with serving(ThreadCluster(config)) as cluster:
        stream = cluster.stream(0)
        stream.finish(requests(golden("olmoe-base")))
        stream.close()
    spans = read_spans(tmp_path)
    busy, idle = sorted({s.worker for s in spans})
    names = {w: {s.name for s in spans if s.worker == w} for w in (busy, idle)}
    assert names[idle] >= {"receive", "experts", "send", "step"}
    assert names[busy] == names[idle] | {"attention", "dispatch", "combine", "sample"}


def test_the_leader_changes_its_mind_from_step_to_step(golden: AnyGolden, tmp_path: Path) -> None:
    """Thresholds between the sizes of the steps; two workers have a core each here."""
    config = make_config(
        golden("olmoe-base").path,
        1,
        1,
        engine={"micro_batch_decode_threshold": 5, "micro_batch_prefill_threshold": 32},
        observability={"trace_dir": str(tmp_path)},
        dtype="float32",
        max_model_len=MAX_MODEL_LEN,
    )
    asked = [
        replace(r, params=replace(r.params, max_tokens=4 * i + 2))
        for i, r in enumerate(requests(golden("olmoe-base")))
    ]
    cluster = RecordedCluster(config)
    with serving(cluster):
        cluster.let_in(0, [0] * len(asked))
        stream = cluster.stream()
        results = stream.finish(asked)
        stream.close()
    for i, request in enumerate(asked):
        expected = golden("olmoe-base").greedy(i)[: request.params.max_tokens]
        assert tuple(results[request.request_id].tokens[0]) == expected
    steps = [s.args for s in read_spans(tmp_path) if s.name == "step"]
    decodes = {s["rows"]["0"]: s["micro_batches"] for s in steps if s["rows"]["0"] <= 8}
    assert decodes[2] == decodes[4] == 1
    assert decodes[5] == decodes[6] == 2
    assert max(s["rows"]["0"] for s in steps if s["micro_batches"] == 2) >= 32
