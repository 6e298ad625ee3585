"""The prefix cache in whole clusters: the same tokens from cached prompts, in every mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.serving_cluster import ThreadCluster, make_config, serving
from workers.requests.request import Request, SamplingParams

PROMPT = tuple(range(5, 54))
"""Three full blocks and a token."""
GREEDY = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)

MODES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "disaggregated": (1, 2, {}),
    "colocated": (0, 2, {"mode": "colocated"}),
    "local": (1, 0, {"mode": "local"}),
}


@pytest.mark.parametrize("mode", MODES)
def test_a_second_request_finds_the_first_ones_blocks(mode: str, tiny_checkpoint: Path) -> None:
    attention, experts, workers = MODES[mode]
    engine = {"deterministic": "on"}
    config = make_config(tiny_checkpoint, attention, experts, workers=workers, engine=engine)
    with serving(ThreadCluster(config)) as cluster:
        stream = cluster.stream()
        found, cached = [], []
        for name, salt in (("a", ""), ("b", ""), ("c", "other")):
            request = Request(request_id=name, prompt=PROMPT, params=GREEDY, cache_salt=salt)
            result = stream.finish([request])[name]
            found.append(result.tokens[0])
            cached.append(result.outputs[0].num_cached_tokens)
        longer = Request(request_id="d", prompt=(*PROMPT, *found[0][:16]), params=GREEDY)
        result = stream.finish([longer])["d"]
        assert result.tokens[0][:4] == found[0][16:]
        assert result.outputs[0].num_cached_tokens == 64  # with a block of the first's output
        stream.close()
        assert cluster.blocks_in_use() == 0
        stats = cluster.snapshot(fresh=True)["workers"][0]["stats"]
    assert found[0] == found[1] == found[2]
    assert cached == [0, 48, 0]
    assert stats["prefix_cache_hits_total"] == 48 + 64
    assert stats["prefix_cache_queries_total"] == 3 * 49 + 65
    assert stats["kv_cache_usage_perc"] == 0
