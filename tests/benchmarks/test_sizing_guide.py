"""The sizing guide: its layouts, and that the document is up to date."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest

from benchmarks.sizing.guide import DOCUMENT, guide
from benchmarks.sizing.layouts import (
    A100_NODE,
    CONTEXT_TOKENS,
    GPUS_PER_NODE,
    H100_NODE,
    H200_NODE,
    MAX_SEQS,
    MEMORY_SHARE,
    NodeKind,
    SizedModel,
    best_layout,
)
from cluster.core.errors import ConfigError
from cluster.sizing.roofline import BankSize, ModelSize

BANK = BankSize(
    num_experts=64, top_k=8, expert_values=3 * 2048 * 1024, in_values=2048, out_values=2048
)
SMALL = SizedModel(
    size=ModelSize(
        banks=(BANK,) * 16,
        attention_values=400_000_000,
        kv_bytes_per_token=2 * 2 * 16 * 2048,
        itemsize=2,
    ),
    attention_weights=500_000_000,
)
"""OLMoE-1B-7B."""


def _times(model: SizedModel, factor: int) -> SizedModel:
    """The model with ``times`` as many layers of experts."""
    size = replace(model.size, banks=model.size.banks * factor)
    return replace(model, size=size)


@pytest.mark.slow
def test_the_document_is_up_to_date() -> None:
    """``python -m benchmarks.sizing_guide`` after a change."""
    assert DOCUMENT.read_text() == guide()


@pytest.mark.parametrize("num_nodes", [1, 3])
@pytest.mark.parametrize("node", [A100_NODE, H100_NODE, H200_NODE], ids=lambda n: n.name)
def test_a_layout_fits(node: NodeKind, num_nodes: int) -> None:
    layout = best_layout(SMALL, node, num_nodes)
    total = num_nodes * GPUS_PER_NODE
    assert layout.num_attention + layout.num_experts == total
    assert min(layout.num_attention, layout.num_experts) >= 2
    token_bytes = SMALL.size.kv_bytes_per_token
    room = MEMORY_SHARE * node.memory_bytes
    assert layout.attention_bytes + layout.kv_tokens * token_bytes <= room
    assert layout.expert_bytes <= room
    assert 0 < layout.num_seqs <= MAX_SEQS * total
    assert layout.num_seqs * CONTEXT_TOKENS <= layout.num_attention * layout.kv_tokens


def test_several_nodes_have_a_whole_copy_on_either_expert_node() -> None:
    layout = best_layout(SMALL, H100_NODE, 3)
    assert (layout.num_attention, layout.num_experts) == (8, 16)
    assert (64 // 16 + layout.num_redundant) * GPUS_PER_NODE == 64


def test_spare_slots_are_what_memory_leaves() -> None:
    """142 GB of experts, 9 GB on each of 16 GPUs, and a copy of each in 9 GB more."""
    large = _times(SMALL, 11)
    assert best_layout(large, H100_NODE, 3).num_redundant == 4
    slot_bytes = 11 * 16 * BANK.expert_values * 2
    tight = replace(H100_NODE, memory_bytes=5.5 * slot_bytes / MEMORY_SHARE)
    assert best_layout(large, tight, 3).num_redundant == 1


def test_a_model_that_is_too_large_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"num_nodes \(1\) of H100-80GB are too few"):
        best_layout(_times(SMALL, 60), H100_NODE, 1)


def test_faster_memory_costs_fewer_gpu_hours() -> None:
    slow, fast = (best_layout(SMALL, node, 1) for node in (A100_NODE, H200_NODE))
    assert fast.gpu_hours_per_million < slow.gpu_hours_per_million
    assert slow.gpu_hours_per_million == pytest.approx(8 / slow.tokens_per_s / 3600 * 1e6)
    assert slow.tokens_per_s == pytest.approx(slow.num_seqs / slow.step_s)


MEMORY_GB = {"A100-80GB": 80, "H100-80GB": 80, "H200-141GB": 141}
BANDWIDTH_GB_S = {"A100-80GB": 2039, "H100-80GB": 3350, "H200-141GB": 4800}


def test_the_numbers_of_the_document_add_up() -> None:
    """By hand, from what a reader sees: within what is lost by rounding."""
    sections = DOCUMENT.read_text().split("\n## ")[1:-1]
    for section in sections:
        name = section.partition("\n")[0]
        facts = re.search(
            r"([\d.]+) billion weights: ([\d.]+) GB of experts(?: \(([\d.]+) bits/weight\))?, "
            r"([\d.]+) GB on every attention GPU, (\d+) kB of KV per token"
            r"(?:, (\d+) MB per recurrent state)?",
            section,
        )
        assert facts is not None, name
        (nodes,) = re.findall(r"^On (\w+) nodes? of 8 GPUs:", section, re.MULTILINE)
        num_nodes = 1 if nodes == "one" else int(nodes)
        billions, expert_gb, bits, attention_gb, token_kb, state_mb = map(float, facts.groups("0"))
        weights = 8 * expert_gb / (bits or 16) + attention_gb / 2
        assert billions == pytest.approx(weights, rel=0.01), name
        rows = [line.strip("| ").split(" | ") for line in section.splitlines() if "B | " in line]
        assert [row[0] for row in rows] == list(MEMORY_GB)
        for node, attention, experts, spare, *numbers in rows:
            attention_on_gpu, experts_on_gpu, kv_thousands, seqs, step_ms, tokens_s, hours = (
                float(number.removesuffix("k")) for number in numbers
            )
            pools = [math.prod(map(int, re.findall(r"\d+", x))) for x in (attention, experts)]
            assert sum(pools) == 8 * num_nodes
            room_gb = 0.9 * MEMORY_GB[node]
            assert attention_on_gpu == attention_gb
            kv_gb = kv_thousands * token_kb / 1000
            states_gb = seqs / pools[0] * state_mb / 1000
            taken_gb = attention_gb + kv_gb + 3 * states_gb + 32 * state_mb / 1000
            assert taken_gb == pytest.approx(room_gb, rel=0.02)
            assert expert_gb / pools[1] <= experts_on_gpu <= room_gb
            assert (experts_on_gpu > 1.01 * expert_gb / pools[1]) is (int(spare) > 0)
            assert seqs * 2.048 <= pools[0] * kv_thousands + 10
            assert seqs <= 64 * sum(pools)
            assert tokens_s == pytest.approx(1000 * seqs / step_ms, rel=0.01)
            assert hours == pytest.approx(sum(pools) / tokens_s / 3600 * 1e6, rel=0.01)
            # No step is shorter than it takes to read all weights and the sequences' KV once.
            read_gb = seqs / pools[0] * 2.048 * token_kb / 1000 + 2 * states_gb
            assert step_ms >= 1000 * read_gb / BANDWIDTH_GB_S[node], name
            assert step_ms >= 1000 * expert_gb / pools[1] / BANDWIDTH_GB_S[node], name
