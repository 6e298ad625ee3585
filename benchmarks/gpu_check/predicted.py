"""Decode steps in one process: the roofline's prediction, compared with the measured time."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch

from benchmarks.checkpoints.random_checkpoint import RandomModel
from cluster.sizing.devices import CPU_CORE
from cluster.sizing.gpus import gpu_spec
from cluster.sizing.roofline import BankSize, DeviceSpec, ModelSize, colocated_step
from workers.model.cuda.device import gpu_facts

GOAL = 0.15
"""Largest difference of a predicted step, as a fraction of the measured one."""


def device_spec(device: torch.device) -> DeviceSpec:
    """Characteristics of the device, as ``plan size`` uses them."""
    return gpu_spec(*gpu_facts(device)) if device.type == "cuda" else CPU_CORE


def model_size(model: RandomModel, dtype: torch.dtype) -> ModelSize:
    """Sizes of a model whose experts have ``dtype``, for the roofline formulas."""
    family = model.described()
    parts = family.attention_tensors()
    config = family.config
    return ModelSize(
        banks=tuple(
            BankSize(
                num_experts=bank.num_experts,
                top_k=bank.top_k,
                expert_values=sum(prod(shape) for _, _, shape in bank.matrices),
                num_exchanges=len(bank.exchanges),
                in_values=sum(exchange.in_width for exchange in bank.exchanges),
                out_values=sum(exchange.out_width for exchange in bank.exchanges),
            )
            for bank in family.banks
        ),
        attention_values=sum(prod(p.part_shape) for p in parts if "embed_tokens" not in p.name),
        kv_bytes_per_token=config.kv_vectors_per_token * config.head_dim * dtype.itemsize,
        itemsize=dtype.itemsize,
    )


def compare(
    size: ModelSize, device: DeviceSpec, context: int, steps_s: Mapping[int, float]
) -> dict[str, dict[str, float | bool]]:
    """Return the predicted and the measured step for each batch size in ``steps_s``.

    ``context``: tokens of context of each sequence; ``steps_s``: measured seconds of a step.
    """
    found: dict[str, dict[str, float | bool]] = {}
    for batch, measured_s in steps_s.items():
        step = colocated_step(size, batch, context, num_workers=1, device=device)
        ratio = step.step_s / measured_s
        found[f"batch {batch}"] = {
            "predicted_s": step.step_s,
            "predicted_host_s": step.host_s,
            "measured_s": measured_s,
            "predicted_by_measured": ratio,
            "is_in_goal": abs(ratio - 1.0) <= GOAL,
        }
    return found


def summary(found: Mapping[str, Mapping[str, float | bool]]) -> str:
    """Return ratios such as ``predicted / measured step 0.87 (batch 1)``."""
    ratios = [f"{one['predicted_by_measured']:.2f} ({name})" for name, one in found.items()]
    return f"predicted / measured step {', '.join(ratios)}"
