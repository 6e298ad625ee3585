"""Sizes of real models, for predictions."""

from __future__ import annotations

from cluster.sizing.roofline import BankSize, ModelSize

OLMOE = ModelSize(
    banks=(
        BankSize(
            num_experts=64,
            top_k=8,
            expert_values=3 * 2048 * 1024,
            in_values=2048,
            out_values=2048,
        ),
    )
    * 16,
    attention_values=16 * 4 * 2048 * 2048 + 50304 * 2048,
    kv_bytes_per_token=2 * 2 * 16 * 2048,
    itemsize=2,
)
"""OLMoE-1B-7B in bfloat16."""
