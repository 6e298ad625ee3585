"""What other modules read of families: banks, exchanges, expert matrices, cached heads."""

from __future__ import annotations

import pytest

from tests.reference.goldens import ALL_VARIANTS, CLASSIFIERS, golden_path
from workers.model.families.registry import load_family
from workers.model.loading.checkpoint import Checkpoint


def test_dots1_has_banks_in_its_last_layers() -> None:
    family = load_family(
        {
            "model_type": "dots1",
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_hidden_layers": 5,
            "n_routed_experts": 16,
            "n_shared_experts": 1,
            "num_experts_per_tok": 4,
            "first_k_dense_replace": 2,
            "hidden_act": "relu",
        }
    )
    assert [(b.index, b.layer) for b in family.banks] == [(0, 2), (1, 3), (2, 4)]
    assert all(b.float32_weights for b in family.banks)
    names = {part.name for part in family.attention_tensors()}
    assert "model.layers.1.mlp.gate_proj.weight" in names
    assert "model.layers.2.mlp.shared_experts.gate_proj.weight" in names
    assert "model.layers.1.mlp.gate.weight" not in names
    assert {e.activation for b in family.banks for e in b.exchanges} == {"relu"}


def test_jetmoe_has_three_exchanges_a_layer_and_caches_its_key_heads_only() -> None:
    family = load_family(
        {
            "model_type": "jetmoe",
            "hidden_size": 48,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "kv_channels": 8,
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "intermediate_size": 40,
        }
    )
    assert [(b.index, b.layer, b.bank) for b in family.banks] == [
        (0, 0, "attention"),
        (1, 0, "mlp"),
        (2, 1, "attention"),
        (3, 1, "mlp"),
    ]
    query, output = family.banks[0].exchanges
    assert (query.in_width, query.out_width, query.weighted) == (48, 16, False)
    assert (output.in_width, output.out_width, output.per_slot_input) == (16, 48, True)
    (mlp,) = family.banks[1].exchanges
    assert mlp.matrix_shapes == ((80, 48), (48, 40))
    assert (family.config.num_heads, family.config.num_kv_heads) == (6, 2)
    assert family.config.kv_vectors_per_token == 2 * 2 * 2


@pytest.mark.parametrize("variant", [*ALL_VARIANTS, *CLASSIFIERS])
def test_every_tensor_on_disk_is_read_once(variant: str) -> None:
    """Attention tensors and all experts together are the checkpoint, as far as bytes go, but for
    layers behind the last one.
    """
    checkpoint = Checkpoint(golden_path(variant, variant.split("-")[0]))
    family = checkpoint.family
    read = sum(checkpoint.num_bytes(part) for part in family.attention_tensors())
    read += sum(
        checkpoint.expert_bytes(bank, expert)
        for bank in family.banks
        for expert in range(bank.num_experts)
    )
    behind = f"model.layers.{family.config.num_layers}.", "mtp."
    on_disk = {name: e for name, e in checkpoint.tensors.items() if not name.startswith(behind)}
    assert (len(on_disk) < len(checkpoint.tensors)) == (
        variant
        in (
            *("glm4moe-official-like", "deepseekv3-official-like", "glm4lite-official-like"),
            *("qwen3next-official-like", "qwen35moe-official-like"),
        )
    )
    assert read == sum(entry.num_bytes for entry in on_disk.values())
    for bank in family.banks:
        for exchange in bank.exchanges:
            matrices = family.expert_matrices(bank, exchange.index, 0, checkpoint.tensors)
            assert tuple(m.shape for m in matrices) == exchange.matrix_shapes
