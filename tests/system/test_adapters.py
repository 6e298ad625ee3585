"""Adapters of serving clusters: selected by the model's name, in every layout, while others come
and go.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks.checkpoints.adapters import (
    RandomAdapter,
    random_adapter,
    target_shapes,
    write_merged,
)
from benchmarks.harness.cluster_gateway import ClusterGateway, gateway_of
from benchmarks.harness.serving_cluster import ServingCluster, ThreadCluster, serving
from benchmarks.harness.stalls import wait_until
from cluster.core.errors import ModelNotFoundError, RequestError
from expertmesh import LLM, SamplingParams
from gateway.core.call import CallKind, GenerateCall
from tests.harness.golden_clusters import float32_config
from tests.reference.goldens import MAX_MODEL_LEN, Golden

NUM_TOKENS = 16
LAYOUTS = [
    pytest.param((2, 2), {}),
    pytest.param((0, 2), {"mode": "colocated"}),
    pytest.param((1, 1), {"mode": "local"}, marks=pytest.mark.slow),
    pytest.param((1, 3), {}, marks=pytest.mark.slow),
]


def adapters_of(golden: Golden) -> Mapping[str, RandomAdapter]:
    shapes = target_shapes(golden.path)
    return {name: random_adapter(shapes, seed) for seed, name in enumerate(("sql", "chat"), 1)}


def call(prompt: tuple[int, ...], model: str | None) -> GenerateCall:
    return GenerateCall(
        kind=CallKind.COMPLETION,
        model=model,
        prompts=(prompt,),
        max_tokens=NUM_TOKENS,
        temperature=0.0,
        ignore_eos=True,
        logprobs=0,
    )


def merged_tokens(golden: Golden, adapter: RandomAdapter, folder: Path) -> list[list[int]]:
    """Greedy tokens of all prompts with an adapter in the weights."""
    path = write_merged(golden.path, adapter, folder)
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    with LLM(path, dtype="float32", max_model_len=MAX_MODEL_LEN, num_threads=1) as llm:
        return [result.outputs[0].token_ids for result in llm.generate(golden.prompts, params)]


def load(cluster: ServingCluster, name: str, path: Path) -> dict[str, Any]:
    found: dict[str, Any] = cluster.call("begin", "load_adapter", {"name": name, "path": str(path)})
    return found


def tokens_of(gateway: ClusterGateway, golden: Golden, name: str | None) -> list[list[int]]:
    answers = gateway.answer([call(tuple(p), name) for p in golden.prompts])
    return [[token.token_id for token in answer.tokens] for answer in answers]


def wait_named(gateway: ClusterGateway, *names: str) -> None:
    wait_until(lambda: set(gateway.core.model.adapters.names()) == set(names), "the gateway knows")


@pytest.mark.parametrize(("pools", "workers"), LAYOUTS)
def test_many_in_one_batch(
    golden: Callable[[str], Golden],
    pools: tuple[int, int],
    workers: dict[str, Any],
    tmp_path: Path,
) -> None:
    expected, adapters = golden("dots1-groups"), adapters_of(golden("dots1-groups"))
    at_start = adapters["sql"].write(tmp_path / "sql")
    config = float32_config(
        expected, *pools, workers=workers, lora={"lora_modules": (f"sql={at_start}",)}
    )
    wanted: dict[str | None, list[list[int]]] = {
        name: merged_tokens(expected, adapter, tmp_path / f"{name}-merged")
        for name, adapter in adapters.items()
    }
    wanted[None] = [list(expected.greedy(i))[:NUM_TOKENS] for i in range(len(expected.prompts))]
    with serving(ThreadCluster(config)) as cluster, gateway_of(cluster) as gateway:
        assert load(cluster, "chat", adapters["chat"].write(tmp_path / "chat"))["state"] == "READY"
        wait_named(gateway, "sql", "chat")
        names = [None, "sql", "chat", "sql", "model", "chat", None, "sql"]
        asked = [call(tuple(p), n) for p, n in zip(expected.prompts, names, strict=True)]
        for place, answer in enumerate(gateway.answer(asked)):
            name = None if names[place] == "model" else names[place]
            assert [token.token_id for token in answer.tokens] == wanted[name][place]
        assert cluster.blocks_in_use() == 0


def test_loaded_and_unloaded_while_others_run(
    golden: Callable[[str], Golden], tmp_path: Path
) -> None:
    expected, adapters = golden("olmoe-norm-gqa-clip"), adapters_of(golden("olmoe-norm-gqa-clip"))
    config = float32_config(expected, 2, 2, lora={"max_loras": 2})
    sql, chat = (adapters[name].write(tmp_path / name) for name in ("sql", "chat"))
    cluster = ThreadCluster(config)
    with serving(cluster), gateway_of(cluster) as gateway:
        with pytest.raises(ModelNotFoundError, match="the model 'sql' does not exist"):
            gateway.answer([call((5, 6), "sql")])
        load(cluster, "sql", sql)
        wait_named(gateway, "sql")
        first = tokens_of(gateway, expected, "sql")
        assert tokens_of(gateway, expected, "sql") == first
        running = gateway.stream([call(tuple(p), "sql") for p in expected.prompts], "running")
        cluster.call("begin", "unload_adapter", {"name": "sql"})
        wait_named(gateway)
        with pytest.raises(ModelNotFoundError):
            gateway.answer([call((5, 6), "sql")])
        found = [[token.token_id for token in answer.tokens] for answer in running.finish()]
        assert found == first
        load(cluster, "sql", chat)  # another one under the same name
        wait_named(gateway, "sql")
        second = tokens_of(gateway, expected, "sql")
        assert second == merged_tokens(expected, adapters["chat"], tmp_path / "merged")
        assert second != first
        cluster.wait(lambda s: len(s["adapters"]) == 1)
        wait_until(lambda: nums_loaded(cluster) == [1, 1], "the old one is freed")


def nums_loaded(cluster: ThreadCluster) -> list[int]:
    """Adapters of each worker that runs attention."""
    roles = [cluster.group.attention(f"attention-{i}") for i in range(2)]
    return [len(role.engine.adapters.keys) for role in roles]


def test_what_cannot_be_loaded_changes_nothing(
    golden: Callable[[str], Golden], tmp_path: Path
) -> None:
    expected, adapters = golden("dots1-groups"), adapters_of(golden("dots1-groups"))
    config = float32_config(expected, 2, 1, lora={"max_lora_rank": 3})
    folder = adapters["sql"].write(tmp_path / "sql")
    with serving(ThreadCluster(config)) as cluster:
        with pytest.raises(RequestError, match=r"rank 4 must not exceed max_lora_rank \(3\)"):
            load(cluster, "sql", folder)
        with pytest.raises(RequestError, match="no such folder"):
            load(cluster, "sql", tmp_path / "missing")
        experts = random_adapter({"model.layers.1.mlp.experts.0.up_proj": (8, 64)}, rank=2)
        with pytest.raises(RequestError, match="up_proj is of routed experts"):
            load(cluster, "sql", experts.write(tmp_path / "experts"))
        assert cluster.snapshot()["adapters"] == []
        assert cluster.snapshot()["state"] == "SERVING"


def test_a_start_with_an_adapter_that_is_not_there_fails(
    golden: Callable[[str], Golden], tmp_path: Path
) -> None:
    missing = f"sql={tmp_path / 'missing'}"
    config = float32_config(golden("dots1-groups"), 1, 1, lora={"lora_modules": (missing,)})
    words = "attention-0: the adapter sql cannot be loaded"
    with pytest.raises(RuntimeError, match=words), serving(ThreadCluster(config)):
        raise AssertionError("it serves")


def test_a_restarted_controller_serves_and_loads_on(
    golden: Callable[[str], Golden], tmp_path: Path
) -> None:
    expected, adapters = golden("dots1-groups"), adapters_of(golden("dots1-groups"))
    cluster = ThreadCluster(float32_config(expected, 1, 2))
    sql = adapters["sql"].write(tmp_path / "sql")
    with serving(cluster):
        key = load(cluster, "sql", sql)["key"]
        shutil.rmtree(sql)  # nothing is read again
        cluster.crash_controller()
        cluster.restore()
        (kept,) = cluster.snapshot()["adapters"]
        assert (kept["name"], kept["key"], kept["state"]) == ("sql", key, "READY")
        with gateway_of(cluster) as gateway:
            wait_named(gateway, "sql")
            found = tokens_of(gateway, expected, "sql")
            assert found == merged_tokens(expected, adapters["sql"], tmp_path / "merged")
            load(cluster, "chat", adapters["chat"].write(tmp_path / "chat"))
            wait_named(gateway, "sql", "chat")
