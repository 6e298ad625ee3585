"""Values of ``quantization_config`` as tools write them."""

from __future__ import annotations

from typing import Any


def group(**weights: Any) -> dict[str, Any]:
    """A group of compressed-tensors."""
    known = {"type": "int", "symmetric": True, "strategy": "group", "group_size": 8}
    return {"targets": ["Linear"], "weights": {**known, "num_bits": 4, **weights}}


def tensors_config(**weights: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group(**weights)},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
    }


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 8, "sym": False, "desc_act": False}
AUTO_ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 8, "sym": False}
SETTINGS: dict[str, dict[str, Any]] = {
    "gptq": GPTQ,
    "gptq-symmetric": {**GPTQ, "sym": True},
    "gptq-v2": {**GPTQ, "checkpoint_format": "gptq_v2", "format": "gptq_v2", "lm_head": True},
    "gptq-8-bits-rows": {**GPTQ, "bits": 8, "group_size": -1, "checkpoint_format": "gptq"},
    "gptq-short-group": {**GPTQ, "group_size": 24, "checkpoint_format": "gptq"},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemm"},
    "awq-symmetric": {"quant_method": "awq", "bits": 4, "group_size": 8, "zero_point": False},
    "auto-round": {**AUTO_ROUND, "packing_format": "auto_round:auto_gptq"},
    "auto-round-v2": {**AUTO_ROUND, "packing_format": "auto_round:gptqmodel", "bits": 8},
    "auto-round-awq": {**AUTO_ROUND, "packing_format": "auto_round:auto_awq"},
    "awq-short-group": {"quant_method": "awq", "bits": 4, "group_size": 40, "zero_point": True},
    "tensors": tensors_config(),
    "tensors-short-group": tensors_config(num_bits=8, group_size=40),
    "tensors-zeros-short-group": tensors_config(symmetric=False, group_size=24),
    "tensors-zeros": tensors_config(symmetric=False),
    "tensors-8-bits-rows": tensors_config(num_bits=8, strategy="channel", group_size=None),
}
