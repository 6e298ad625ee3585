"""Attention workers with very different loads: some idle, some prefilling, some decoding.

Every request gives what it gives alone in the local engine.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import pytest
from msgspec.structs import replace

from benchmarks.harness.engine_stream import EngineStream, Result
from benchmarks.harness.local_engine import LocalEngine
from benchmarks.harness.serving_cluster import make_config, serving
from cluster.config.cluster import EngineSection
from tests.fakes import TINY_CONFIG, tiny_tensors, write_tiny_checkpoint
from tests.harness.recorded_cluster import RecordedCluster
from workers.requests.request import Request, SamplingParams
from workers.requests.step_header import Grant

GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
KINDS = (
    GREEDY,
    replace(GREEDY, temperature=1.0, seed=1),
    replace(GREEDY, temperature=0.8, top_p=0.9, seed=2, frequency_penalty=0.4),
    replace(GREEDY, temperature=1.3, top_k=12, seed=3, repetition_penalty=1.2),
)
ENGINE = {
    "block_size_tokens": 4,
    "max_num_batched_tokens": 32,
    "max_num_seqs": 16,
    "deterministic": "on",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a context of 1024 tokens."""
    path = tmp_path_factory.mktemp("uneven")
    config = {**TINY_CONFIG, "max_position_embeddings": 1024}
    write_tiny_checkpoint(path, config, tiny_tensors(config))
    return path


@dataclass
class Load:
    """Requests of one attention worker, and when they come."""

    at_once: list[Request] = field(default_factory=list)
    """At the start."""
    later: list[Request] = field(default_factory=list)
    """Spread over the time in which the busiest worker serves what it has from the start."""

    @property
    def requests(self) -> list[Request]:
        return [*self.at_once, *self.later]


def make_requests(name: str, count: int, length: int, seed: int = 0) -> list[Request]:
    """Random prompts of up to ``length`` tokens, all kinds of sampling."""
    rng = random.Random(f"{name}/{seed}")
    return [
        Request(
            request_id=f"{name}-{i}",
            prompt=tuple(rng.randint(3, 95) for _ in range(rng.randint(1 + length // 2, length))),
            params=replace(KINDS[i % len(KINDS)], max_tokens=rng.randint(4, 24)),
        )
        for i in range(count)
    ]


def serve(cluster: RecordedCluster, loads: dict[int, Load]) -> dict[str, Result]:
    """Serve everything."""
    streams = {rank: cluster.stream(rank) for rank in loads}
    for rank, load in loads.items():
        for request in load.at_once:
            streams[rank].send(request)
    _send_later(streams, loads)
    results: dict[str, Result] = {}
    for rank, load in loads.items():
        results |= streams[rank].collect(load.requests)
        streams[rank].close()
    return results


def _send_later(streams: dict[int, EngineStream], loads: dict[int, Load]) -> None:
    """Evenly between the outputs of the busiest worker, one for each token."""
    arrivals = [(rank, request) for rank, load in loads.items() for request in load.later]
    busiest = max(loads, key=lambda rank: len(loads[rank].at_once))
    num_outputs = sum(r.params.max_tokens for r in loads[busiest].at_once)
    seen = []
    for rank, request in arrivals:
        seen += [streams[busiest].next() for _ in range(num_outputs // (len(arrivals) + 1))]
        streams[rank].send(request)
    streams[busiest].put_back(seen)


def check_exact(checkpoint: Path, loads: dict[int, Load], results: dict[str, Result]) -> None:
    local = LocalEngine(checkpoint, section=EngineSection(deterministic="on"))
    for request in (r for load in loads.values() for r in load.requests):
        (alone,) = local.generate([request.prompt], request.params)
        assert results[request.request_id].tokens == [list(alone.token_ids)], request


@pytest.mark.parametrize(
    ("idle", "prefilling", "decoding"),
    [(0, 1, 2), (2, 0, 1), (1, 2, 0)],
    ids=["the leader idles", "the leader prefills", "the leader decodes"],
)
def test_one_idles_one_prefills_one_decodes(
    checkpoint: Path, idle: int, prefilling: int, decoding: int
) -> None:
    loads = {
        decoding: Load(make_requests("many", 12, 8) + make_requests("more", 3, 12)),
        prefilling: Load(make_requests("long", 1, 700) + make_requests("short", 2, 20)),
        idle: Load(make_requests("late", 2, 30)),
    }
    arrivals = {decoding: [0] * 12 + [6, 9, 12], prefilling: [0, 15, 16], idle: [17, 18]}
    cluster = RecordedCluster(make_config(checkpoint, 3, 2, engine=ENGINE))
    with serving(cluster):
        for rank, num_steps in arrivals.items():
            cluster.let_in(rank, num_steps)
        results = serve(cluster, loads)
        assert cluster.blocks_in_use() == 0
        headers = [step.header for step in cluster.steps()]
    check_exact(checkpoint, loads, results)
    assert any(
        h.grant(idle) == Grant()
        and h.grant(prefilling).prefill_rows
        and h.grant(decoding).decode_rows
        for h in headers
    ), "all three at once"
    assert any(all(h.grant(rank).num_rows for rank in range(3)) for h in headers), "no idler left"


MATRIX = list(product((2, 3), (1, 2, 3, 4), ("sockets", "collective"), (1, 2)))
DEFAULT = ((2, 3, "sockets", 2), (3, 2, "collective", 1))


@pytest.mark.parametrize(
    ("attention", "experts", "transport", "num_micro_batches"),
    [pytest.param(*row, marks=() if row in DEFAULT else pytest.mark.slow) for row in MATRIX],
)
def test_random_loads_in_every_layout(
    checkpoint: Path, attention: int, experts: int, transport: str, num_micro_batches: int
) -> None:
    """Pools so small that sequences give way, prompts of all lengths, target on and off."""
    rng = random.Random(f"{attention}/{experts}/{transport}/{num_micro_batches}")
    loads = {
        rank: Load(
            make_requests(f"a{rank}", rng.choice((0, 1, 10)), rng.choice((6, 60, 300)), rank),
            make_requests(f"b{rank}", rng.choice((0, 3)), rng.choice((6, 200)), rank),
        )
        for rank in range(attention)
    }
    loads[0].at_once += make_requests("sure", 4, 10)
    engine = {
        **ENGINE,
        "num_micro_batches": num_micro_batches,
        "kv_cache_bytes": 100 * 1024,  # 400 tokens
        "itl_target_ms": rng.choice((None, 0.001, 20.0)),
    }
    transport_section = {"transport": transport}
    config = make_config(checkpoint, attention, experts, engine=engine, transport=transport_section)
    cluster = RecordedCluster(config)
    with serving(cluster):
        results = serve(cluster, loads)
        assert cluster.blocks_in_use() == 0
    check_exact(checkpoint, loads, results)
