"""``python -m benchmarks.sizing_guide`` writes ``docs/reference/sizing.md``: GPUs for models."""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks.checkpoints.public_shape import MODELS
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
from cluster.sizing.gpus import H100

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "reference" / "sizing.md"
NODES = (A100_NODE, H100_NODE, H200_NODE)
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
    "GPU-hours per million tokens",
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
    size = facts.size("bfloat16", None)
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

This page shows how many GPUs a model needs, and how to divide them into attention and expert
workers. It is for readers who plan a cluster; `python -m benchmarks.sizing_guide` writes it.

The tables are for nodes of {GPUS_PER_NODE} GPUs, in bfloat16, with experts in the format of the
checkpoint. A worker has one GPU; `8 x 2 pods` means two pods with 8 GPUs (workers) each. A cluster
also needs a head (4 CPUs, 16 GiB) and two gateways (4 CPUs, 8 GiB), without GPUs. Each row is the
division of the GPUs with the highest predicted tokens per second. On one node, each pool has at
least two workers; on several nodes, each pool has whole nodes, and at least two nodes hold experts.
The columns mean:

- Spare slots: slots for second copies of experts, in each expert worker and layer. With two or more
  expert nodes, they hold a second copy of every expert, to the extent that memory allows, so that
  the loss of a node requires no loading of weights. On one node, they are a quarter
  ({SPARE_SHARE:g}) of the worker's other slots, for rebalancing.
- GB per GPU: weights, with all spare slots in use. Weights and KV cache together use at most
  {MEMORY_SHARE:.0%} of the memory of a GPU.
- Sequences: the number of sequences of {CONTEXT_TOKENS} tokens whose KV cache fits, at most
  {MAX_SEQS} times the number of all GPUs.
- Step: the predicted duration of a decode step with this number of sequences, by the roofline
  (`cluster/sizing/roofline.py`) with the characteristics of the GPUs (`cluster/sizing/gpus.py`) and
  a balancedness (mean load of the expert workers divided by the highest load) of
  {BALANCEDNESS:g}. It includes the time of an attention worker's host, while the GPUs wait:
  {1e3 * H100.host.step_s:.2g} ms for the step and {1e6 * H100.host.row_s:.2g} us for each row.
- Tokens/s: sequences divided by the duration of the step. This is a prediction, not a measurement,
  and prompts take part of the time.

How fast kernels read memory was measured on one H100, and the host's time on an AMD EPYC. Messages
between GPUs have not been measured: the predictions assume {1e6 * H100.message_s:.2g} us for each
message at both ends, and {1e6 * H100.latency_s:.2g} us between. Decode steps of JetMoE, Qwen3-Next,
GLM-4.7-Flash and DeepSeek-V3 are not [CUDA graphs](../explanation/gpu.md#a-decode-step): the host
launches each of their kernels, which takes {1e6 * H100.launch_s:.2g} us.

For another model or other hardware run
`expertmesh plan size MODEL --workers 16 --device cuda --bandwidth-gb-s 2000`, which also shows
whether one pool (colocated) is faster. Separate pools scale and fail separately, but are not always
faster."""
_COST = """\
## Cost

    cost of a million tokens     = GPU-hours per million tokens x price of a GPU-hour
    GPU-hours per million tokens = GPUs / tokens per second / 3600 x 1000000

Add the hourly price of the CPUs of the head and the gateways, divided by the tokens per hour. Then
divide by the utilization of the cluster, because an idle cluster costs as much as a busy one."""


def main() -> None:
    """Write the page."""
    DOCUMENT.write_text(guide())
