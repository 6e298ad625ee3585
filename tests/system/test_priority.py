"""Priorities through real workers: the urgent request goes first, and the other goes on exactly."""

from __future__ import annotations

from pathlib import Path

from msgspec.structs import replace

from benchmarks.harness.local_engine import LocalEngine
from benchmarks.harness.serving_cluster import make_config, serving
from cluster.config.cluster import EngineSection
from tests.harness.recorded_cluster import RecordedCluster
from workers.requests.request import Request, SamplingParams


def test_an_urgent_request_takes_the_only_seat_and_gives_it_back(tiny_checkpoint: Path) -> None:
    params = SamplingParams(max_tokens=40, temperature=1.0, seed=4, ignore_eos=True)
    low = Request(request_id="low", prompt=(5, 6, 7), params=params, priority=10)
    also_low = replace(low, request_id="also low", params=replace(params, max_tokens=5))
    urgent = replace(low, request_id="urgent", priority=-1, params=replace(params, max_tokens=5))
    engine = {"max_num_seqs": 1, "deterministic": "on"}
    cluster = RecordedCluster(make_config(tiny_checkpoint, 1, 1, engine=engine))
    with serving(cluster):
        cluster.let_in(0, [0, 1, 1])
        stream = cluster.stream()
        stream.send(low)
        stream.send(also_low)
        stream.send(urgent)
        results = stream.collect([low, also_low, urgent])
        stream.close()
        ran = [name for step in cluster.steps() for name in step.tokens]
        stats = cluster.snapshot(fresh=True)["workers"][0]["stats"]
    assert ran.index("urgent") < len(ran) - 1 - ran[::-1].index("low") < ran.index("also low")
    assert ran[ran.index("urgent") :][:5] == ["urgent"] * 5
    assert stats["num_preemptions_total"] == 1
    local = LocalEngine(tiny_checkpoint, section=EngineSection(deterministic="on"))
    for request in (low, also_low, urgent):
        (alone,) = local.generate([request.prompt], request.params)
        assert results[request.request_id].tokens == [list(alone.token_ids)]
