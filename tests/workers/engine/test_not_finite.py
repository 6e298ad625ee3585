"""NaN or infinity fails the request that has it: not its mates, not later holders of its blocks.

The last element of the residual stream is a switch: token 95 sets it to 1, all others to -1, and no
layer writes to it. Infinite logits and broken experts hang on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from msgspec import structs
from torch import Tensor

from benchmarks.harness.local_engine import LocalEngine
from benchmarks.harness.serving_cluster import ThreadCluster, make_config, serving
from cluster.config.cluster import EngineSection
from cluster.core.errors import PeerLostError
from tests.fakes import TINY_CONFIG, FailingDispatcher, tiny_tensors, write_tiny_checkpoint
from tests.reference.exact import exact
from workers.dispatch.dispatcher import TokenDispatcher
from workers.requests.request import FinishReason, Request, SamplingParams, TokenOutput

pytestmark = pytest.mark.heavy

BAD = 95
PARAMS = SamplingParams(
    max_tokens=6, temperature=0.0, logprobs=2, ignore_eos=True, logit_bias=((BAD, -1e4),)
)
HEALTHY = [
    Request(request_id=f"good{i}", prompt=tuple(range(5 + i, 5 + i + n)), params=PARAMS)
    for i, n in enumerate((1, 9, 30, 64))
]
SECTION = EngineSection(block_size_tokens=4, deterministic="on")
KINDS = ("embedding", "expert", "logits")


def poisoned(kind: str) -> dict[str, Tensor]:
    """Tensors with which token 95, and it alone, brings NaN or infinity."""
    tensors = tiny_tensors()
    embedding = tensors["model.embed_tokens.weight"]
    embedding[:, -1] = -1
    embedding[BAD, -1] = 1
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor[-1] = 0
    if kind == "embedding":
        embedding[BAD] = float("nan")
    elif kind == "expert":  # no other row goes to the first expert of the second layer
        tensors["model.layers.1.mlp.gate.weight"][0] = 0
        tensors["model.layers.1.mlp.gate.weight"][0, -1] = 1e4
        tensors["model.layers.1.mlp.experts.0.up_proj.weight"][3] = float("nan")
    else:  # hidden states are finite, and so are logits where the switch is at -1
        tensors["lm_head.weight"][7, :] = 0
        tensors["lm_head.weight"][7, -1] = 3e38
        tensors["model.norm.weight"][-1] = 1e3
        embedding[:, -1] = 0
        embedding[BAD, -1] = 1
    return tensors


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By kind."""
    paths = {}
    for kind in KINDS:
        paths[kind] = tmp_path_factory.mktemp(kind)
        write_tiny_checkpoint(paths[kind], TINY_CONFIG, poisoned(kind))
    return paths


def bad_request(name: str = "bad", before: int = 20, n: int = 1, **params: object) -> Request:
    """A prompt that ends with the token that breaks things."""
    prompt = (*range(40, 40 + before), BAD)
    own = structs.replace(PARAMS, **params)
    return Request(request_id=name, prompt=prompt, params=own, n=n)


def check_failed(outputs: Sequence[TokenOutput]) -> None:
    last = outputs[-1]
    assert last.finish_reason is FinishReason.ERROR
    assert last.error_code == "internal_error"
    assert "not finite" in (last.error or "")
    assert not any(output.token_ids for output in outputs)


def check_clean(engine: LocalEngine) -> None:
    """No trace is left for the next holder of a block."""
    for layer in engine.engine.cache.layers:
        assert torch.isfinite(layer).all()
    engine.engine.check_integrity()
    assert engine.engine.pool.num_free == engine.engine.pool.num_blocks


@pytest.mark.parametrize("num_micro_batches", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_mates_are_undisturbed_to_the_last_bit(
    checkpoints: dict[str, Path], kind: str, num_micro_batches: int
) -> None:
    alone = LocalEngine(checkpoints[kind], section=SECTION)
    expected = {key: exact(outputs) for key, outputs in alone.run(HEALTHY).items()}
    engine = LocalEngine(checkpoints[kind], section=SECTION, num_micro_batches=num_micro_batches)
    found = engine.run([bad_request("bad1", n=2), *HEALTHY, bad_request("bad2", before=0)])
    for key in (("bad1", 0), ("bad1", 1), ("bad2", 0)):
        check_failed(found.pop(key))
    assert {key: exact(outputs) for key, outputs in found.items()} == expected
    check_clean(engine)


@pytest.mark.parametrize("kind", KINDS)
def test_the_next_holder_of_the_blocks_is_undisturbed(
    checkpoints: dict[str, Path], kind: str
) -> None:
    """A pool that one request fills."""
    expected = LocalEngine(checkpoints[kind], section=SECTION).run(HEALTHY[-1:])
    section = replace(SECTION, kv_cache_bytes=72 * 2 * 2 * 2 * 8 * 4)
    engine = LocalEngine(checkpoints[kind], section=section)
    for _ in range(2):
        check_failed(engine.run([bad_request(before=40)])["bad", 0])
        found = engine.run(HEALTHY[-1:])
        assert exact(found["good3", 0]) == exact(expected["good3", 0])


def test_infinite_logits_of_a_prompt_token_fail_where_they_are_asked_for(
    checkpoints: dict[str, Path],
) -> None:
    """Position 20 of 30 has them."""
    engine = LocalEngine(checkpoints["logits"], section=SECTION)
    prompt = (*range(40, 60), BAD, *range(60, 70))
    silent = Request(request_id="silent", prompt=prompt, params=PARAMS)
    outputs = engine.run([silent])["silent", 0]
    assert outputs[-1].finish_reason is FinishReason.LENGTH, "its own logits are finite"
    for params in (
        structs.replace(PARAMS, prompt_logprobs=0),
        SamplingParams(max_tokens=0, prompt_logprobs=1),
    ):
        asking = Request(request_id="asking", prompt=prompt, params=params)
        found = engine.run([asking, *HEALTHY])
        check_failed(found["asking", 0])
        for request in HEALTHY:
            assert found[request.request_id, 0][-1].finish_reason is FinishReason.LENGTH
    check_clean(engine)


@pytest.mark.parametrize("fail_at", [1, 2, 3])
def test_a_step_that_breaks_leaves_nothing_behind(
    checkpoints: dict[str, Path], fail_at: int
) -> None:
    """The peer is lost after NaN was written; the request is aborted, and others get its blocks."""
    failing: list[FailingDispatcher] = []

    def wrap(inner: TokenDispatcher) -> TokenDispatcher:
        failing.append(FailingDispatcher(inner))
        return failing[0]

    engine = LocalEngine(checkpoints["embedding"], section=SECTION, wrap=wrap)
    engine.engine.add_request(HEALTHY[1])
    first = engine.step()
    engine.engine.add_request(bad_request())
    failing[0].fail_at = fail_at
    with pytest.raises(PeerLostError):
        engine.step()
    engine.engine.abort("bad")
    outputs = [*first]
    while engine.engine.has_work:
        outputs += engine.step()
    expected = LocalEngine(checkpoints["embedding"], section=SECTION).run(HEALTHY[1:2])
    assert exact(outputs) == exact(expected["good1", 0])
    check_clean(engine)


@pytest.mark.parametrize("mode", ["disaggregated", "colocated"])
@pytest.mark.parametrize("kind", KINDS)
def test_workers_and_mates_in_a_cluster_are_undisturbed(
    checkpoints: dict[str, Path], kind: str, mode: str
) -> None:
    expected = LocalEngine(checkpoints[kind], section=SECTION).run(HEALTHY)
    config = make_config(
        checkpoints[kind],
        1,
        2,
        workers={"mode": mode},
        engine={"deterministic": "on", "block_size_tokens": 4},
    )
    asked = [bad_request("bad1"), *HEALTHY, bad_request("bad2", before=0)]
    with serving(ThreadCluster(config)) as cluster:
        for _ in range(2):
            stream = cluster.stream()
            found = stream.finish(asked)
            stream.close()
            for name in ("bad1", "bad2"):
                check_failed(found.pop(name).outputs)
            for name, result in found.items():
                assert exact(result.outputs) == exact(expected[name, 0]), name
        assert cluster.snapshot()["state"] == "SERVING"
        assert cluster.blocks_in_use() == 0
