"""``--deterministic`` in one process: alone, batched, chunked, preempted, the same bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from itertools import cycle, product
from typing import Any

import pytest
from msgspec.structs import replace

from benchmarks.harness.local_engine import LocalEngine
from cluster.config.cluster import EngineSection
from cluster.core.errors import ConfigError
from tests.reference.exact import exact, follow_ups, mixed_requests
from tests.reference.goldens import MAX_MODEL_LEN, Golden
from workers.model.config import ModelConfig
from workers.requests.request import Request

pytestmark = pytest.mark.heavy

AnyGolden = Callable[[str], Golden]
Bits = dict[str, tuple[object, ...]]

WAYS: dict[str, dict[str, Any]] = {
    "together": {},
    "two micro-batches": {"num_micro_batches": 2},
    "short chunks": {"max_num_seqs": 32, "max_num_batched_tokens": 37},
    "preempted": {"kv_tokens": 200, "block_size_tokens": 4, "min_preemptions": 10},
    "small blocks": {"block_size_tokens": 4},
    "odd blocks, few at once": {"block_size_tokens": 24, "max_num_seqs": 5},
}
"""Settings of the engine that must not change a bit."""
VARIANTS = (
    "olmoe-base",
    "olmoe-norm-gqa-clip",
    "olmoe-bias-tied-mqa",
    "olmoe-rope-dynamic",
    "dots1-groups",
    "dots1-swa",
    "jetmoe-untied-top3-eps",
    "jetmoe-gelu-yarn-fp16",
    "qwen3moe-window-bias-tied",
    "glm4moe-quarter-tied",
    "mixtral-window-tied",
    "minimaxm2-official-like",
    "ernie45-headdim-linear",
    "deepseekv3-plain-tied",
    "deepseekv2-official-like",
    "qwen3next-layers-bias-tied",
    "qwen35moe-base",
)
QUICK = {
    ("dots1-groups", "float32", "short chunks"),
    ("jetmoe-untied-top3-eps", "bfloat16", "preempted"),
    ("qwen3next-layers-bias-tied", "bfloat16", "preempted"),
}


def make_engine(
    golden: Golden, dtype: str, num_micro_batches: int = 1, **section: Any
) -> LocalEngine:
    return LocalEngine(
        golden.path,
        dtype=dtype,
        section=EngineSection(deterministic="on", **section),
        max_model_len=MAX_MODEL_LEN,
        num_micro_batches=num_micro_batches,
    )


def bits_of(engine: LocalEngine, requests: list[Request]) -> Bits:
    """Serve requests together."""
    return {name: exact(outputs) for (name, _), outputs in engine.run(requests).items()}


@pytest.fixture(scope="module")
def alone(golden: AnyGolden) -> Callable[[str, str], Bits]:
    """By variant and dtype what each request gives when it is served alone."""

    @cache
    def find(variant: str, dtype: str) -> Bits:
        engine = make_engine(golden(variant), dtype)
        found: Bits = {}
        for request in mixed_requests(engine.config.vocab_size):
            found |= bits_of(engine, [request])
        return found

    return find


def kv_bytes(config: ModelConfig, num_tokens: int, dtype: str) -> int:
    """Memory for the keys and values of this number of tokens."""
    per_token = config.kv_vectors_per_token * config.head_dim
    return num_tokens * per_token * (4 if dtype == "float32" else 2)


def cases() -> Iterator[Any]:
    """(variant, dtype, way): OLMoE in most ways, a few other families in one of them by default.

    Every way has its own dtype by default, by turns.
    """
    turns = dict(zip(WAYS, cycle(("float32", "bfloat16")), strict=False))
    for variant, dtype, way in product(VARIANTS, ("float32", "bfloat16"), WAYS):
        is_turn = variant == "olmoe-base" and dtype == turns[way] and "blocks" not in way
        is_default = is_turn or (variant, dtype, way) in QUICK
        marks = () if is_default else pytest.mark.slow
        yield pytest.param(variant, dtype, way, marks=marks)


@pytest.mark.parametrize(("variant", "dtype", "way"), list(cases()))
def test_company_and_history_change_no_bit(
    golden: AnyGolden, alone: Callable[[str, str], Bits], variant: str, dtype: str, way: str
) -> None:
    settings = dict(WAYS[way])
    min_preemptions = settings.pop("min_preemptions", 0)
    if "kv_tokens" in settings:
        config = make_engine(golden(variant), dtype).config
        settings["kv_cache_bytes"] = kv_bytes(config, settings.pop("kv_tokens"), dtype)
    engine = make_engine(golden(variant), dtype, **settings)
    found = bits_of(engine, mixed_requests(engine.config.vocab_size))
    assert engine.engine.stats()["num_preemptions_total"] >= min_preemptions
    for name, expected in alone(variant, dtype).items():
        assert found[name] == expected, name


@pytest.mark.slow
def test_dynamic_rotation_depends_on_the_row_alone(
    golden: AnyGolden, alone: Callable[[str, str], Bits]
) -> None:
    """Powers and cosines of a row are computed in the step, for all its rows."""
    engine = make_engine(golden("olmoe-rope-dynamic"), "float32", max_num_batched_tokens=300)
    found = bits_of(engine, mixed_requests(engine.config.vocab_size))
    assert found == alone("olmoe-rope-dynamic", "float32")


FEW = pytest.mark.parametrize(
    ("variant", "dtype"),
    [
        pytest.param("olmoe-base", "float32", marks=pytest.mark.slow),
        pytest.param("olmoe-base", "bfloat16", marks=pytest.mark.slow),
        ("dots1-swa", "bfloat16"),
        pytest.param("jetmoe-untied-top3-eps", "float32", marks=pytest.mark.slow),
    ],
)
"""The first families; in the long tier, in every dtype."""


@FEW
def test_a_request_that_moves_goes_on_as_before(
    golden: AnyGolden, alone: Callable[[str, str], Bits], variant: str, dtype: str
) -> None:
    """Another engine gets the prompt and the first tokens, and makes the rest."""
    engine = make_engine(golden(variant), dtype)
    moved, expected = [], {}
    for i, request in enumerate(mixed_requests(engine.config.vocab_size)):
        tokens, logprobs = alone(variant, dtype)[request.request_id][:2]
        assert isinstance(tokens, tuple)
        assert isinstance(logprobs, tuple)
        done = 1 + i % (len(tokens) - 1)
        moved.append(replace(request, attempt=1, output_so_far=(tokens[:done],)))
        expected[request.request_id] = (tokens[done:], logprobs[done:])
    found = bits_of(engine, moved)
    assert {name: bits[:2] for name, bits in found.items()} == expected


@pytest.mark.parametrize("variant", ["dots1-swa", "dots1-dense2-yarn", "jetmoe-tied"])
def test_other_families_are_deterministic_too(golden: AnyGolden, variant: str) -> None:
    """A sigmoid router, shared experts and windows; experts inside of attention."""
    engine = make_engine(golden(variant), "float32")
    requests = mixed_requests(engine.config.vocab_size, 12, max_tokens=8)
    expected: Bits = {}
    for request in requests:
        expected |= bits_of(engine, [request])
    mixed = make_engine(golden(variant), "float32", 2, max_num_seqs=32, max_num_batched_tokens=37)
    assert bits_of(mixed, requests) == expected


def test_logits_of_classes_have_the_same_bits_in_any_batch(golden: AnyGolden) -> None:
    expected = golden("jetmoe-seqcls")
    engine = make_engine(expected, "float32", max_num_batched_tokens=64)
    alone = [engine.classify([prompt])[0] for prompt in expected.prompts]
    assert engine.classify(expected.prompts) == alone


@FEW
def test_hits_of_decoded_blocks_change_no_bit(
    golden: AnyGolden, alone: Callable[[str, str], Bits], variant: str, dtype: str
) -> None:
    """Keys and values that decode steps wrote against those of a prompt computed at once."""
    first = mixed_requests(make_engine(golden(variant), dtype).config.vocab_size)
    second = follow_ups(first, alone(variant, dtype))
    engine = make_engine(golden(variant), dtype, enable_prefix_caching=False)
    expected: Bits = {}
    for request in second:
        expected |= bits_of(engine, [request])
    assert not engine.engine.stats()["prefix_cache_hits_total"]
    engine = make_engine(golden(variant), dtype, block_size_tokens=4)
    bits_of(engine, first)
    assert bits_of(engine, second) == expected
    hits = engine.engine.stats()["prefix_cache_hits_total"]
    answered = sum(len(r.prompt) - 5 for r in second)
    assert hits > answered - 5 * len(second), "all but the ends are found"


def test_deterministic_needs_a_cpu(golden: AnyGolden) -> None:
    with pytest.raises(ConfigError, match=r"deterministic \(True\) needs device cpu"):
        LocalEngine(
            golden("olmoe-base").path, device="meta", section=EngineSection(deterministic="on")
        )
