"""One module and one registry line are all that a new model family needs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.harness.local_engine import LocalEngine
from benchmarks.harness.serving_cluster import ThreadCluster, make_config, serving
from cluster.config.cluster import EngineSection
from tests.gateway.stack import post
from tests.harness.served_stack import stack_over
from tests.reference.exact import exact, mixed_requests
from tests.reference.toy_family import CONFIG
from workers.model.families.registry import FAMILIES, load_family


@pytest.fixture
def toy(tmp_path: Path) -> Iterator[Path]:
    """A random checkpoint of a family that is registered for the test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "toy", "tests.reference.toy_family")
        generator = torch.Generator().manual_seed(0)
        tensors = {
            name: torch.ones(shape)
            if len(shape) == 1
            else torch.randn(shape, generator=generator) * (2 / shape[-1] ** 0.5)
            for name, shape in _shapes().items()
        }
        save_file(tensors, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(CONFIG))
        yield tmp_path


def _shapes() -> dict[str, tuple[int, ...]]:
    family = load_family(CONFIG)
    shapes = {part.name: part.shape for part in family.attention_tensors()}
    for bank in family.banks:
        for exchange, expert in product(bank.exchanges, range(bank.num_experts)):
            for matrix in family.expert_matrices(bank, exchange.index, expert, ()):
                shapes |= {part.name: part.shape for part in matrix.parts}
    return shapes


@pytest.mark.parametrize("mode", ["disaggregated", "colocated"])
def test_workers_give_the_bits_of_one_process(toy: Path, mode: str) -> None:
    """With copies, micro-batches, the prefix cache and ``--deterministic``."""
    local = LocalEngine(toy, section=EngineSection(deterministic="on"))
    asked = mixed_requests(int(CONFIG["vocab_size"]), 12, max_tokens=8)
    config = make_config(
        toy,
        2,
        2,
        dtype="float32",
        engine={"deterministic": "on", "num_micro_batches": 2},
        workers={"mode": mode, "num_redundant_experts": 1},
    )
    with serving(ThreadCluster(config)) as cluster:
        found = cluster.answers(asked)
    for request in asked:
        ((_, outputs),) = local.run([request]).items()
        assert exact(found[request.request_id].outputs) == exact(outputs)


def test_the_gateway_serves_it(toy: Path) -> None:
    with stack_over(toy) as stack:
        completed = post(stack, "/v1/completions", prompt=[5, 6, 7], max_tokens=4)
        assert completed.json()["usage"]["completion_tokens"] == 4
        inside = post(stack, "/v1/inspect", token_ids=[5, 6, 7], outputs=["routes", "loss"])
        (row,) = inside.json()["data"]
        assert [bank["layer"] for bank in row["routes"]] == [0, 1]
