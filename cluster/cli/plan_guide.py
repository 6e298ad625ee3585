"""``plan size --guide``: the text of ``docs/sizing.md``, from the numbers of models and nodes."""

from __future__ import annotations

import os
from pathlib import Path

from cluster.checkpoint_check import CheckpointCheck
from cluster.devices import A100_NODE, GPUS_PER_NODE, H100_NODE, H200_NODE, NodeKind
from cluster.mode_choice import bank_sizes
from cluster.sizing import ModelSize
from cluster.sizing_guide import (
    BALANCEDNESS,
    CONTEXT_TOKENS,
    MAX_SEQS,
    MEMORY_SHARE,
    SPARE_SHARE,
    Layout,
    SizedModel,
    best_layout,
)

MODELS = Path(__file__).with_name("models")
"""``NAME/config.json`` of public checkpoints: their shapes, no weights."""
NODES = (A100_NODE, H100_NODE, H200_NODE)
BFLOAT16 = 2
_CHOICES = (
    ("OLMoE-1B-7B-0924", "OLMoE-1B-7B", 1),
    ("jetmoe-8b", "JetMoE-8B", 1),
    ("dots.llm1.inst", "dots.llm1", 3),
)
"""Folder of the config, name, nodes."""
_HEADER = (
    "Node",
    "Attention",
    "Experts",
    "Spare slots",
    "GB a GPU, attention",
    "GB a GPU, experts",
    "KV tokens a GPU",
    "Sequences",
    "Step, ms",
    "Tokens/s",
    "GPU-hours a million",
)


def guide() -> str:
    """The whole document, without a newline at the end. Raises ``CheckpointError``."""
    parts = [_INTRODUCTION]
    for folder, name, num_nodes in _CHOICES:
        model = known_model(folder)
        layouts = [(node, best_layout(model, node, num_nodes)) for node in NODES]
        parts.append(_section(name, model, layouts))
    return "\n\n".join([*parts, _COST])


def known_model(folder: str) -> SizedModel:
    """The numbers of a public checkpoint, in bfloat16."""
    facts = CheckpointCheck(MODELS / folder, os.environ, allow_bare=True).result()
    size = ModelSize(
        banks=bank_sizes(facts.banks, None),
        attention_values=facts.attention_values,
        kv_values_per_token=facts.kv_values_per_token,
        itemsize=BFLOAT16,
    )
    return SizedModel(size=size, attention_weights=facts.attention_weights)


def _section(name: str, model: SizedModel, layouts: list[tuple[NodeKind, Layout]]) -> str:
    size = model.size
    experts = sum(b.num_experts * b.expert_values for b in size.banks)
    num_nodes = layouts[0][1].num_nodes
    nodes = "one node" if num_nodes == 1 else f"{num_nodes} nodes"
    facts = (
        f"{(experts + model.attention_weights) / 1e9:.1f} billion weights: "
        f"{experts * size.itemsize / 1e9:.1f} GB of experts, "
        f"{model.attention_weights * size.itemsize / 1e9:.1f} GB on every attention GPU, "
        f"{size.kv_values_per_token * size.itemsize / 1e3:.0f} kB of KV a token.\n"
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
        "As options, for the H100 row: "
        f"`--num-attention-workers {layout.num_attention} --num-expert-workers "
        f"{layout.num_experts} --num-redundant-experts {layout.num_redundant}`."
    )


_INTRODUCTION = f"""\
# Sizing guide

Written by `expertmesh plan size --guide`; a test compares. Groups of GPUs for three models on nodes
of {GPUS_PER_NODE} GPUs, in bfloat16. A worker has one GPU; `8 x 2 pods` is a group of two pods with
8 GPUs each. Besides there are a head (4 CPUs, 16 GiB) and two gateways (4 CPUs, 8 GiB), without
GPUs. On one node every split with two workers of each pool was compared; on several nodes a pool is
whole nodes, two of them for experts. The row has the one with the most tokens a second that fits.

- Memory: {MEMORY_SHARE:.0%} of a GPU is for weights and KV.
- Redundancy: on two expert nodes or more, spare slots for a second copy of every expert, as far as
  memory goes, so that either node may be lost with no weight moved; on one node a quarter of the
  own slots ({SPARE_SHARE:g}), for rebalancing.
- Sequences: as many as have {CONTEXT_TOKENS} tokens of KV each, at most {MAX_SEQS} for each GPU.
- Tokens a second: all of them over a decode step by the roofline (`cluster/sizing.py`), with
  balancedness {BALANCEDNESS:g} and the data sheets' numbers (`cluster/devices.py`). It is what the
  hardware allows, not what was measured: expect less, and prompts take their share too.

Another model, other numbers: `expertmesh plan size MODEL --workers N --bandwidth-gb-s ...`, which
also says whether one pool (colocated) is faster. The pools here buy elasticity and failure
isolation, not always speed."""
_COST = """\
## Cost

    cost of a million tokens = GPU-hours a million x price of a GPU-hour
    GPU-hours a million      = GPUs / tokens a second / 3600 x 1000000

The head and the gateways take no GPU: add their CPUs' price an hour over the tokens of an hour.
Divide by the share of time that the cluster is full; an idle cluster costs the same."""
