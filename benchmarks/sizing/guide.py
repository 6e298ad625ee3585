"""``python -m benchmarks.sizing_guide`` writes ``docs/reference/sizing.md``: GPUs for models."""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks.sizing.layouts import (
    A100_NODE,
    BALANCEDNESS,
    CONTEXT_TOKENS,
    GPUS_PER_NODE,
    H100_NODE,
    H200_NODE,
    MAX_SEQS,
    MEMORY_SHARE,
    SPARE_SHARE,
    Layout,
    NodeKind,
    SizedModel,
    best_layout,
)
from cluster.launch.checkpoint_check import CheckpointCheck
from cluster.sizing.mode_choice import bank_sizes
from cluster.sizing.roofline import ModelSize

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "reference" / "sizing.md"
MODELS = Path(__file__).parents[1] / "models"
"""``NAME/config.json`` of public checkpoints: their shapes, no weights."""
NODES = (A100_NODE, H100_NODE, H200_NODE)
BFLOAT16 = 2
_CHOICES = (
    ("OLMoE-1B-7B-0924", "OLMoE-1B-7B", 1),
    ("jetmoe-8b", "JetMoE-8B", 1),
    ("dots.llm1.inst", "dots.llm1", 3),
    ("Qwen3-30B-A3B", "Qwen3-30B-A3B", 1),
    ("Qwen3-235B-A22B", "Qwen3-235B-A22B", 3),
    ("Qwen3-Coder-480B-A35B", "Qwen3-Coder-480B-A35B", 4),
    ("Qwen3-Next-80B-A3B-Instruct", "Qwen3-Next-80B-A3B", 1),
    ("GLM-4.5-Air", "GLM-4.5-Air", 1),
    ("GLM-4.5", "GLM-4.5", 3),
    ("gpt-oss-120b", "gpt-oss-120b", 1),
    ("GLM-4.7-Flash", "GLM-4.7-Flash", 1),
    ("DeepSeek-V3", "DeepSeek-V3", 4),
)
"""Folder of the config, name, nodes."""
_HEADER = (
    "Node",
    "Attention",
    "Experts",
    "Spare slots",
    "GB per GPU, attention",
    "GB per GPU, experts",
    "KV tokens per GPU",
    "Sequences",
    "Step, ms",
    "Tokens/s",
    "GPU-hours per million",
)


def guide() -> str:
    """The whole document. Raises ``CheckpointError``."""
    parts = [_INTRODUCTION]
    for folder, name, num_nodes in _CHOICES:
        model = known_model(folder)
        layouts = [(node, best_layout(model, node, num_nodes)) for node in NODES]
        parts.append(_section(name, model, layouts))
    return "\n\n".join([*parts, _COST]) + "\n"


def known_model(folder: str) -> SizedModel:
    """The numbers of a public checkpoint, in bfloat16."""
    facts = CheckpointCheck(MODELS / folder, os.environ, allow_bare=True).result()
    size = ModelSize(
        banks=bank_sizes(facts.banks, None),
        attention_values=facts.attention_values,
        kv_bytes_per_token=facts.kv_bytes_per_token("bfloat16"),
        state_bytes=facts.state_bytes,
        itemsize=BFLOAT16,
    )
    return SizedModel(size=size, attention_weights=facts.attention_weights)


def _section(name: str, model: SizedModel, layouts: list[tuple[NodeKind, Layout]]) -> str:
    size = model.size
    values = sum(b.num_experts * b.expert_values for b in size.banks)
    kept_bytes = sum(b.num_experts * b.memory_bytes(size.itemsize) for b in size.banks)
    num_nodes = layouts[0][1].num_nodes
    nodes = "one node" if num_nodes == 1 else f"{num_nodes} nodes"
    states = f", {size.state_bytes / 1e6:.0f} MB per recurrent state" if size.state_bytes else ""
    facts = (
        f"{(values + model.attention_weights) / 1e9:.1f} billion weights: "
        f"{kept_bytes / 1e9:.1f} GB of experts"
        f"{f' ({8 * kept_bytes / values:.2f} bits/weight)' if kept_bytes < 2 * values else ''}, "
        f"{model.attention_weights * size.itemsize / 1e9:.1f} GB on every attention GPU, "
        f"{size.kv_bytes_per_token / 1e3:.0f} kB of KV per token{states}.\n"
        f"On {nodes} of {GPUS_PER_NODE} GPUs:"
    )
    rows = [_HEADER, tuple("---" for _ in _HEADER), *(_row(*pair) for pair in layouts)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"## {name}\n\n{facts}\n\n{table}\n\n{_options(layouts[1][1])}"


def _row(node: NodeKind, layout: Layout) -> tuple[str, ...]:
    return (
        node.name,
        _pool(layout.num_attention),
        _pool(layout.num_experts),
        str(layout.num_redundant),
        f"{layout.attention_bytes / 1e9:.1f}",
        f"{layout.expert_bytes / 1e9:.1f}",
        f"{layout.kv_tokens // 1000}k",
        str(layout.num_seqs),
        f"{1e3 * layout.step_s:.1f}",
        f"{layout.tokens_per_s:.0f}",
        f"{layout.gpu_hours_per_million:.3g}",
    )


def _pool(num_workers: int) -> str:
    """``8 x 2 pods``: GPUs of a pod, pods."""
    if num_workers <= GPUS_PER_NODE:
        return f"{num_workers} x 1 pod"
    return f"{GPUS_PER_NODE} x {num_workers // GPUS_PER_NODE} pods"


def _options(layout: Layout) -> str:
    return (
        "Options for the H100 row: "
        f"`--num-attention-workers {layout.num_attention} --num-expert-workers "
        f"{layout.num_experts} --num-redundant-experts {layout.num_redundant}`."
    )


_INTRODUCTION = f"""\
# Sizing guide

`python -m benchmarks.sizing_guide` writes this page; a test compares both. The tables show GPU
groups for models on nodes of {GPUS_PER_NODE} GPUs, in bfloat16, with experts in the format of the
checkpoint. A worker has one GPU; `8 x 2 pods` is a group of two pods with 8 GPUs each. A cluster
also needs a head (4 CPUs, 16 GiB) and two gateways (4 CPUs, 8 GiB), without GPUs. On one node all
splits with at least two workers per pool were compared. On several nodes a pool consists of whole
nodes, and two nodes hold experts. Each row is the fastest split that fits, in tokens per second.

- Memory: weights and KV use {MEMORY_SHARE:.0%} of a GPU.
- Redundancy: on two or more expert nodes, spare slots hold a second copy of every expert, to the
  extent that memory allows, so that the loss of one node requires no loading of weights. On
  one node, spare slots for a quarter of the worker's own slots ({SPARE_SHARE:g})
  are for rebalancing.
- Sequences: the number of sequences of {CONTEXT_TOKENS} tokens whose KV fits, at
  most {MAX_SEQS} per GPU.
- Tokens/s: the number of sequences divided by the duration of a decode step, by the roofline
  (`cluster/sizing/roofline.py`), with balancedness {BALANCEDNESS:g} and the values of the data
  sheets (`cluster/sizing/gpus.py`). This is a limit of the hardware, not a measurement: the actual
  speed is lower, and prompts take part of the time.

For another model or other hardware run
`expertmesh plan size MODEL --workers 16 --device cuda --bandwidth-gb-s 2000`, which also shows
whether one pool (colocated) is faster. Separate pools provide elasticity and failure isolation, but
not always more speed."""
_COST = """\
## Cost

    cost of a million tokens = GPU-hours per million x price of a GPU-hour
    GPU-hours per million    = GPUs / tokens per second / 3600 x 1000000

The head and the gateways have no GPU: add the hourly price of their CPUs, divided by the tokens per
hour. Divide the result by the utilization of the cluster: an idle cluster costs the same."""


def main() -> None:
    """Write the page."""
    DOCUMENT.write_text(guide())
