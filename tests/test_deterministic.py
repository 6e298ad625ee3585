"""``--deterministic`` in every layout: each request gives the bits of the local engine, alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest

from cluster.config import EngineSection
from tests.engine_stream import Result
from tests.exact import exact, follow_ups, mixed_requests
from tests.goldens import MAX_MODEL_LEN, Golden
from tests.serving_cluster import ServingCluster, ThreadCluster, make_config, serving
from workers.local_engine import LocalEngine
from workers.request import Request

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
QUICK = (
    "1x1-bfloat16-2",
    "1x4-float32-1",
    "2x3-bfloat16-1",
    "3x2-float32-2",
    "2-float32-1",
    "3-bfloat16-2",
)
"""Every value of a dimension with every one of the others, but for the sizes of the two pools."""


@pytest.fixture(scope="module")
def alone(golden: AnyGolden) -> Callable[[str, str], Bits]:
    """By variant and dtype what each request gives alone in one process, then each follow-up."""

    @cache
    def find(variant: str, dtype: str) -> Bits:
        engine = LocalEngine(
            golden(variant).path,
            dtype=dtype,
            section=EngineSection(deterministic=True, enable_prefix_caching=False),
            max_model_len=MAX_MODEL_LEN,
        )
        first = mixed_requests(engine.config.vocab_size)
        found = one_by_one(engine, first)
        return found | one_by_one(engine, follow_ups(first, found))

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
            "deterministic": True,
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


@pytest.mark.parametrize(
    "layout",
    [pytest.param(x, marks=() if str(x) in QUICK else pytest.mark.slow) for x in LAYOUTS],
    ids=str,
)
def test_a_layout_changes_no_bit(
    golden: AnyGolden, alone: Callable[[str, str], Bits], layout: Layout
) -> None:
    """32 requests at once; then second turns, which find what decodes wrote."""
    expected = alone(VARIANT, layout.dtype)
    with deterministic(golden(VARIANT), layout) as cluster:
        asked = mixed_requests(cluster.snapshot()["model"]["vocab_size"])
        found = answers(cluster, asked)
        check(found, expected)
        check(answers(cluster, follow_ups(asked, found)), expected)
        assert total(cluster, "prefix_cache_hits_total") > 500
        assert cluster.blocks_in_use() == 0


@pytest.mark.parametrize(
    ("variant", "layout"),
    [
        ("dots1-swa", Layout(attention=2, experts=3, dtype="bfloat16", micro_batches=2)),
        (
            "jetmoe-untied-top3-eps",
            Layout(attention=2, experts=2, dtype="float32", micro_batches=2),
        ),
        pytest.param(
            "dots1-groups",
            Layout(attention=3, experts=2, dtype="float32", micro_batches=2),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "jetmoe-tied",
            Layout(attention=1, experts=4, dtype="bfloat16", micro_batches=1),
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_a_layout_changes_no_bit_of_other_families(
    golden: AnyGolden, alone: Callable[[str, str], Bits], variant: str, layout: Layout
) -> None:
    with deterministic(golden(variant), layout) as cluster:
        asked = mixed_requests(cluster.snapshot()["model"]["vocab_size"])
        check(answers(cluster, asked), alone(variant, layout.dtype))


@pytest.mark.parametrize(
    ("dtype", "transport"), [("float32", "collective"), ("bfloat16", "sockets")]
)
def test_preemption_and_copies_of_experts_change_no_bit(
    golden: AnyGolden, alone: Callable[[str, str], Bits], dtype: str, transport: str
) -> None:
    """Pools of few blocks, short chunks, and experts whose copies share the prompt rows."""
    config = LocalEngine(golden(VARIANT).path).config
    per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    engine = {
        "kv_cache_bytes": 200 * per_token * (4 if dtype == "float32" else 2),
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
