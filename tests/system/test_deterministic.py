"""``--deterministic`` in every layout: each request gives the bits of the local engine, alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
from msgspec.structs import replace

from benchmarks.harness.engine_stream import Result
from benchmarks.harness.local_engine import LocalEngine
from benchmarks.harness.serving_cluster import ServingCluster, ThreadCluster, make_config, serving
from cluster.config.cluster import EngineSection
from tests.reference.exact import exact, follow_ups, mixed_requests
from tests.reference.goldens import MAX_MODEL_LEN, Golden
from tests.workers.inspection.test_inspection import everything, has_aux
from workers.requests.request import Request, SamplingParams

AnyGolden = Callable[[str], Golden]
Bits = dict[str, tuple[object, ...]]
VARIANT = "olmoe-base"
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """One row of the matrix."""

    attention: int
    """Attention workers; 0: the expert workers are colocated."""
    experts: int
    dtype: str
    micro_batches: int

    def __str__(self) -> str:
        pools = f"{self.attention}x{self.experts}" if self.attention else f"{self.experts}"
        return f"{pools}-{self.dtype}-{self.micro_batches}"


LAYOUTS = tuple(
    Layout(attention=a, experts=e, dtype=dtype, micro_batches=m)
    for a in (0, 1, 2, 3)
    for e in (1, 2, 3, 4)
    for dtype in DTYPES
    for m in (1, 2)
)


Alone = Callable[..., Bits]


@pytest.fixture(scope="module")
def alone(golden: AnyGolden) -> Alone:
    """What each of the first ``count`` requests gives alone in one process, then each follow-up."""

    @cache
    def find(variant: str, dtype: str, count: int = 32, has_follow_ups: bool = False) -> Bits:
        engine = LocalEngine(
            golden(variant).path,
            dtype=dtype,
            section=EngineSection(deterministic="on", enable_prefix_caching=False),
            max_model_len=MAX_MODEL_LEN,
        )
        first = mixed_requests(engine.config.vocab_size)[:count]
        found = one_by_one(engine, first)
        return found | (one_by_one(engine, follow_ups(first, found)) if has_follow_ups else {})

    return find


def one_by_one(engine: LocalEngine, requests: list[Request]) -> Bits:
    found: Bits = {}
    for request in requests:
        for (name, _), outputs in engine.run([request]).items():
            found[name] = exact(outputs)
    return found


def answers(cluster: ServingCluster, asked: list[Request]) -> Bits:
    """Serve requests together; the last attention worker has most of them."""
    num_workers = cluster.config.workers.num_attention_ranks or 0
    streams = [cluster.stream(rank) for rank in range(num_workers)]
    shares: list[list[Request]] = [[] for _ in streams]
    for i, request in enumerate(asked):
        shares[min(i % 5, num_workers - 1)].append(request)
    for stream, share in zip(streams, shares, strict=True):
        for request in share:
            stream.send(request)
    results: dict[str, Result] = {}
    for stream, share in zip(streams, shares, strict=True):
        results |= stream.collect(share)
        stream.close()
    return {name: exact(result.outputs) for name, result in results.items()}


@contextmanager
def deterministic(
    golden: Golden,
    layout: Layout,
    engine: Mapping[str, Any] | None = None,
    workers: Mapping[str, Any] | None = None,
    transport: str = "sockets",
) -> Iterator[ServingCluster]:
    """A cluster of this layout."""
    config = make_config(
        golden.path,
        layout.attention,
        layout.experts,
        dtype=layout.dtype,
        max_model_len=MAX_MODEL_LEN,
        engine={
            "deterministic": "on",
            "num_micro_batches": layout.micro_batches,
            **(engine or {}),
        },
        workers={
            "mode": "disaggregated" if layout.attention else "colocated",
            **(workers or {}),
        },
        transport={"transport": transport},
    )
    with serving(ThreadCluster(config)) as cluster:
        yield cluster


def check(found: Bits, expected: Bits) -> None:
    """Names the first request that differs."""
    assert found
    for name, bits in found.items():
        assert bits == expected[name], name


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_layout_changes_no_bit(golden: AnyGolden, alone: Alone, layout: Layout) -> None:
    """32 requests at once; then second turns, which find what decodes wrote."""
    expected = alone(VARIANT, layout.dtype, has_follow_ups=True)
    with deterministic(golden(VARIANT), layout) as cluster:
        asked = mixed_requests(cluster.snapshot()["model"]["vocab_size"])
        found = answers(cluster, asked)
        check(found, expected)
        check(answers(cluster, follow_ups(asked, found)), expected)
        assert total(cluster, "prefix_cache_hits_total") > 500
        assert cluster.blocks_in_use() == 0


NUM_OTHER = 12
"""Requests of each other family."""
OTHER_VARIANTS = (
    *("dots1-swa", "dots1-groups", "jetmoe-untied-top3-eps", "jetmoe-tied"),
    *("qwen3moe-dense-layers", "glm4moe-norms-groups", "mixtral-window-tied"),
    *("minimaxm2-official-like", "ernie45-layers"),
    *("deepseekv3-base", "deepseekv2-official-like", "glm4lite-layers-tied"),
)
OTHER_QUICK = {
    ("jetmoe-untied-top3-eps", "2-float32-1"),
    ("qwen3moe-dense-layers", "2x3-bfloat16-2"),
    ("glm4moe-norms-groups", "2-float32-1"),
    ("qwen3next-official-like", "2x2-bfloat16-2"),
}
"""Both dtypes, one and two micro-batches, two pools and colocated workers."""


def other_cases() -> Iterator[Any]:
    """(variant, layout): all layouts, few of them by default."""
    for variant in OTHER_VARIANTS:
        for layout in LAYOUTS:
            is_quick = (variant, str(layout)) in OTHER_QUICK
            yield pytest.param(
                variant,
                layout,
                marks=() if is_quick else pytest.mark.slow,
                id=f"{variant}-{layout}",
            )


@pytest.mark.parametrize(("variant", "layout"), list(other_cases()))
def test_a_layout_changes_no_bit_of_other_families(
    golden: AnyGolden, alone: Alone, variant: str, layout: Layout
) -> None:
    """The same requests with few blocks, in short chunks and beside copies of some experts."""
    expected = alone(variant, layout.dtype, NUM_OTHER)
    engine = {
        "kv_cache_bytes": pool_bytes(golden(variant), layout.dtype, num_tokens=220),
        "block_size_tokens": 4,
        "max_num_seqs": 32,
        "max_num_batched_tokens": 70,
    }
    copies = {"num_redundant_experts": 1 if layout.experts > 1 else 0}
    with deterministic(golden(variant), layout, engine, copies) as cluster:
        asked = mixed_requests(cluster.snapshot()["model"]["vocab_size"])[:NUM_OTHER]
        check(answers(cluster, asked), expected)
        assert cluster.blocks_in_use() == 0


def pool_bytes(golden: Golden, dtype: str, num_tokens: int) -> int:
    """Memory for the keys and values of this number of tokens."""
    config = LocalEngine(golden.path).config
    per_token = config.kv_vectors_per_token * config.head_dim
    return num_tokens * per_token * (4 if dtype == "float32" else 2)


@pytest.mark.parametrize(
    ("variant", "layout"),
    [
        ("olmoe-base", Layout(attention=2, experts=3, dtype="float32", micro_batches=2)),
        ("dots1-swa", Layout(attention=0, experts=2, dtype="bfloat16", micro_batches=2)),
        ("jetmoe-tied", Layout(attention=2, experts=2, dtype="float32", micro_batches=1)),
        ("qwen3moe-base", Layout(attention=2, experts=2, dtype="bfloat16", micro_batches=1)),
        ("glm4moe-base", Layout(attention=0, experts=2, dtype="float32", micro_batches=2)),
        ("qwen3next-base", Layout(attention=2, experts=2, dtype="bfloat16", micro_batches=2)),
        ("flexolmo-base", Layout(attention=2, experts=2, dtype="bfloat16", micro_batches=2)),
        ("gptoss-base", Layout(attention=2, experts=2, dtype="bfloat16", micro_batches=2)),
        ("deepseekv3-base", Layout(attention=2, experts=2, dtype="float32", micro_batches=2)),
    ],
    ids=str,
)
def test_a_layout_changes_no_bit_of_inspections(
    golden: AnyGolden, variant: str, layout: Layout
) -> None:
    expected = golden(variant)
    asked = [
        Request(
            request_id=f"i{i}",
            prompt=prompt,
            params=SamplingParams(max_tokens=0),
            inspection=replace(everything(prompt, has_aux(variant)), attentions=False),
        )
        for i, prompt in enumerate(expected.prompts)
    ]
    local = LocalEngine(
        expected.path, dtype=layout.dtype, section=EngineSection(deterministic="on")
    )
    small = {"max_num_batched_tokens": 24, "max_num_seqs": 4}
    with deterministic(expected, layout, small) as cluster:
        found = cluster.answers(asked)
    for request in asked:
        ((_, outputs),) = local.run([request]).items()
        assert found[request.request_id].outputs[-1].arrays == outputs[-1].arrays


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "transport"),
    [
        ("float32", "collective"),
        pytest.param("bfloat16", "sockets", marks=pytest.mark.slow),
    ],
)
def test_preemption_and_copies_of_experts_change_no_bit(
    golden: AnyGolden, alone: Alone, dtype: str, transport: str
) -> None:
    """Pools of few blocks, short chunks, and experts whose copies share the prompt rows."""
    engine = {
        "kv_cache_bytes": pool_bytes(golden(VARIANT), dtype, num_tokens=200),
        "block_size_tokens": 4,
        "max_num_seqs": 32,
        "max_num_batched_tokens": 70,
    }
    layout = Layout(attention=2, experts=3, dtype=dtype, micro_batches=2)
    copies = {"num_redundant_experts": 8}
    with deterministic(golden(VARIANT), layout, engine, copies, transport) as cluster:
        asked = mixed_requests(cluster.snapshot()["model"]["vocab_size"])
        check(answers(cluster, asked), alone(VARIANT, dtype))
        assert total(cluster, "num_preemptions_total") > 5


def total(cluster: ServingCluster, name: str) -> float:
    """A counter over all workers."""
    workers = cluster.snapshot(fresh=True)["workers"]
    return sum(float(worker["stats"].get(name, 0.0)) for worker in workers)
