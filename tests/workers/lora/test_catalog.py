"""Which matrices adapters may change, and the reason for others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from workers.lora.catalog import refusal_reason, targets_of
from workers.model.config import TensorPart
from workers.model.layers import LayerProduct, Linear

PART = TensorPart(name="model.layers.0.self_attn.q_proj.weight", shape=(8, 4))
PRODUCT = Linear(torch.zeros(8, 4))


def names_of(**parts: TensorPart) -> list[str]:
    return list(targets_of([LayerProduct(PRODUCT, parts)]))


def test_whole_matrices_by_the_names_of_their_modules() -> None:
    other = replace(PART, name="model.layers.0.self_attn.k_proj.weight")
    products = [LayerProduct(PRODUCT, {"q": PART}), LayerProduct(PRODUCT, {"k": other})]
    targets = targets_of(products)
    module = "model.layers.0.self_attn"
    assert list(targets) == [f"{module}.q_proj", f"{module}.k_proj"]
    found = targets[f"{module}.k_proj"]
    assert (found.product, found.name, found.part) == (products[1], "k", other)


@pytest.mark.parametrize(
    "part",
    [
        replace(PART, shape=(3, 8, 4), index=0),
        replace(PART, index=0),
        replace(PART, rows=(0, 2)),
        replace(PART, is_transposed=True),
        replace(PART, shape=(8,)),
    ],
    ids=str,
)
def test_parts_of_tensors_and_vectors_are_none(part: TensorPart) -> None:
    assert names_of(q=PART, part=part) == ["model.layers.0.self_attn.q_proj"]
    assert names_of(part=part) == []


@pytest.mark.parametrize("name", ["router", "attention_router", "mlp_router", "shared_gate"])
def test_routers_are_none(name: str) -> None:
    assert names_of(**{name: PART}) == []


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ("model.layers.0.mlp.experts.3.up_proj", "is of routed experts"),
        ("model.layers.0.mlp.experts", "is of routed experts"),
        ("model.layers.0.mlp.input_linear", "is of routed experts"),
        ("model.embed_tokens", "is the embedding"),
        ("lm_head", "is the model's head"),
        ("model.layers.0.mlp.gate", "is a router or a gate"),
        ("model.layers.0.mlp.shared_expert_gate", "is a router or a gate"),
        ("model.norm", "is a norm"),
        ("model.layers.0.self_attn.x_proj", "is no projection"),
        ("model.experts_of_mine.x_proj", "is no projection"),
    ],
)
def test_each_other_module_has_a_reason(module: str, reason: str) -> None:
    assert refusal_reason(module).startswith(reason)
