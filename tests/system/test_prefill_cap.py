"""A long prompt on one attention worker holds up no decode for longer than a capped chunk.

Counted in steps: how long a step takes is not looked at.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from benchmarks.harness.engine_stream import EngineStream
from benchmarks.harness.local_engine import LocalEngine
from benchmarks.harness.serving_cluster import make_config, serving
from cluster.config.cluster import EngineSection
from tests.fakes import TINY_CONFIG, tiny_tensors, write_tiny_checkpoint
from tests.harness.recorded_cluster import RecordedCluster, RecordedStep
from tests.harness.tiers import quick_rows
from workers.requests.request import FinishReason, Request, SamplingParams

BLOCK_SIZE = 16
LONG = 2000
ENGINE = {"itl_target_ms": 0.001, "block_size_tokens": BLOCK_SIZE, "deterministic": "on"}
ENDLESS = SamplingParams(max_tokens=2000, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def long_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a context of 4096 tokens."""
    path = tmp_path_factory.mktemp("long")
    config = {**TINY_CONFIG, "max_position_embeddings": 4096}
    write_tiny_checkpoint(path, config, tiny_tensors(config))
    return path


def long_request(seed: int) -> Request:
    rng = random.Random(seed)
    prompt = tuple(rng.randint(3, 95) for _ in range(LONG))
    params = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
    return Request(request_id=f"long-{seed}", prompt=prompt, params=params)


def start_decodes(streams: list[EngineStream], ranks: list[int]) -> list[Request]:
    """One endless request on each of these ranks; returns when all of them decode."""
    requests = [
        Request(request_id=f"decode-{i}", prompt=(5 + i, 6, 7), params=ENDLESS)
        for i in range(len(ranks))
    ]
    for rank, request in zip(ranks, requests, strict=True):
        streams[rank].send(request)
        while streams[rank].next().request_id != request.request_id:
            pass
    for rank in set(ranks):
        streams[rank].next()
    return requests


def mixed_steps(steps: list[RecordedStep]) -> list[RecordedStep]:
    """Steps in which rows of prompts meet rows that decode."""
    return [s for s in steps if s.header.decode_rows and s.header.prefill_rows]


@pytest.mark.parametrize(
    "rank_of_long", quick_rows({0}, [0, 2]), ids=["on the leader", "on an idle worker"]
)
def test_decodes_of_all_workers_go_on_in_every_step_of_a_long_prefill(
    long_checkpoint: Path, rank_of_long: int
) -> None:
    """The target cannot be met, so that the cap is the least there is: one block."""
    config = make_config(long_checkpoint, 3, 1, engine=ENGINE)
    request = long_request(1)
    cluster = RecordedCluster(config)
    with serving(cluster):
        streams = [cluster.stream(rank) for rank in range(3)]
        decoding = start_decodes(streams, [0, 1, 1])
        num_before = len(cluster.steps())
        (result,) = streams[rank_of_long].finish([request]).values()
        for stream in streams:
            stream.close()
        steps = mixed_steps(cluster.steps()[num_before:])
    assert result.reasons == [FinishReason.LENGTH]
    assert result.tokens[0] == list(local_tokens(long_checkpoint, request))
    assert len(steps) == LONG // BLOCK_SIZE
    for step in steps:
        assert step.header.prefill_rows <= BLOCK_SIZE
        assert all(step.tokens.get(r.request_id) == 1 for r in decoding), step


def test_two_long_prompts_share_the_cap(long_checkpoint: Path) -> None:
    config = make_config(long_checkpoint, 3, 1, engine=ENGINE)
    requests = [long_request(1), long_request(2)]
    cluster = RecordedCluster(config)
    with serving(cluster):
        streams = [cluster.stream(rank) for rank in range(3)]
        (decoding,) = start_decodes(streams, [1])
        num_before = len(cluster.steps())
        for rank in (0, 2):
            cluster.let_in(rank, [num_before + 20])
        streams[0].send(requests[0])
        streams[2].send(requests[1])
        results = [streams[0].collect(requests[:1]), streams[2].collect(requests[1:])]
        for stream in streams:
            stream.close()
        steps = mixed_steps(cluster.steps()[num_before:])
    for request, result in zip(requests, results, strict=True):
        tokens = result[request.request_id].tokens[0]
        assert tokens == list(local_tokens(long_checkpoint, request))
    assert all(step.header.prefill_rows <= BLOCK_SIZE for step in steps)
    assert all(step.tokens[decoding.request_id] == 1 for step in steps)
    shares = [{s.header.grant(rank).prefill_rows for s in steps[10:200]} for rank in (0, 2)]
    assert shares == [{0, BLOCK_SIZE}, {0, BLOCK_SIZE}]
    turns = [s.header.grant(0).prefill_rows for s in steps[10:200]]
    assert turns[0::2] != turns[1::2], "the grant goes to each in turn"
    assert sum(turns) == 95 * BLOCK_SIZE


def local_tokens(checkpoint: Path, request: Request) -> tuple[int, ...]:
    """What the local engine makes of the request alone."""
    local = LocalEngine(checkpoint, section=EngineSection(deterministic="on"))
    (result,) = local.generate([request.prompt], request.params)
    return result.token_ids


def test_the_local_engine_keeps_to_the_cap_too(long_checkpoint: Path) -> None:
    section = EngineSection(itl_target_ms=0.001, block_size_tokens=BLOCK_SIZE)
    local = LocalEngine(long_checkpoint, section=section)
    local.engine.add_request(Request(request_id="decode", prompt=(5, 6, 7), params=ENDLESS))
    for _ in range(3):
        local.step()
    request = long_request(3)
    local.engine.add_request(request)
    steps: list[set[str]] = []
    while not steps or "long-3" not in steps[-1]:
        steps.append({output.request_id for output in local.step()})
    assert len(steps) == LONG // BLOCK_SIZE
    assert all("decode" in step for step in steps)
