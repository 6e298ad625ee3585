"""Every combination of the engine's options, and the check that none of them changes an answer.

``pairwise`` picks few combinations in which every possible pair of values occurs: most faults of
options show with two of them. ``python -m tests.long.matrix`` runs them all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import combinations, product
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from benchmarks.harness.local_engine import LocalEngine
from benchmarks.harness.serving_cluster import ThreadCluster, make_config, serving
from cluster.config.cluster import ClusterConfig, Deterministic, EngineSection
from cluster.config.kv_cache import KvCacheDType
from tests.reference.exact import exact, mixed_requests
from workers.requests.request import Request, TokenOutput

OPTIONS: Mapping[str, tuple[Any, ...]] = {
    "mode": ("local", "disaggregated", "colocated"),
    "num_micro_batches": (1, 2),
    "enable_prefix_caching": (False, True),
    "deterministic": ("off", "auto", "on"),
    "combine_mode": ("sum", "per_slot"),
    "transport": ("sockets", "collective"),
    "dtype": ("float32", "bfloat16"),
    "kv_cache_dtype": ("auto", "fp8"),
    "quantize": ("auto", "int8", "int4 all"),
    "num_attention_workers": (1, 2),
    "num_expert_workers": (1, 2),
    "itl_target_ms": (None, 5.0),
}
"""Values by option."""
ROUNDING = {"float32": 1e-3, "bfloat16": 0.2}
"""Largest difference of logprobs of runs that add up in different orders. In bfloat16 0.118 was
seen in 14 clusters: a router that takes its second best expert, or four units in the last bit."""
Choice = Mapping[str, Any]
"""One value for each option."""


def is_possible(choice: Choice) -> bool:
    """Whether the values make a cluster of their own, and not one that others describe too."""
    attention, experts = choice["num_attention_workers"], choice["num_expert_workers"]
    match choice["mode"]:
        case "local":
            alone = (attention, experts, choice["transport"]) == (1, 1, "sockets")
            return alone and choice["combine_mode"] == "sum"  # no data plane: no choice
        case "colocated":
            return bool(attention == experts)
    return True


def all_choices(options: Mapping[str, tuple[Any, ...]] = OPTIONS) -> Iterator[Choice]:
    """The full matrix."""
    for values in product(*options.values()):
        choice = dict(zip(options, values, strict=True))
        if is_possible(choice):
            yield choice


def pairs_of(choice: Choice) -> frozenset[tuple[tuple[str, Any], tuple[str, Any]]]:
    """All pairs of (option, value) in a combination."""
    return frozenset(combinations(choice.items(), 2))


def pairwise(choices: Sequence[Choice]) -> list[Choice]:
    """Few of the combinations that have every pair of values which any of them has.

    Greedy: always the one with most pairs that are new, the first of several.
    """
    bits: dict[Any, int] = {}  # each pair is a bit: sets of them are numbers
    masks = []
    for choice in choices:
        places = [bits.setdefault(pair, len(bits)) for pair in pairs_of(choice)]
        masks.append(sum(1 << place for place in places))
    missing = (1 << len(bits)) - 1
    picked = []
    while missing:
        best = max(range(len(choices)), key=lambda i: (masks[i] & missing).bit_count())
        picked.append(choices[best])
        missing &= ~masks[best]
    return picked


def describe(choice: Choice) -> str:
    """Short words for a combination."""
    words = [
        choice["mode"],
        f"{choice['num_attention_workers']}x{choice['num_expert_workers']}",
        choice["transport"],
        choice["dtype"],
        choice["combine_mode"],
        f"mb{choice['num_micro_batches']}",
        *(["fp8"] if choice["kv_cache_dtype"] == "fp8" else []),
        *([choice["quantize"].replace(" ", "-")] if choice["quantize"] != "auto" else []),
        *(["caching"] if choice["enable_prefix_caching"] else []),
        f"deterministic-{choice['deterministic']}",
    ]
    return "-".join(words + (["itl"] if choice["itl_target_ms"] else []))


def config_of(choice: Choice, checkpoint: Path) -> ClusterConfig:
    """The configuration of a combination."""
    engine = "num_micro_batches enable_prefix_caching deterministic combine_mode kv_cache_dtype"
    return make_config(
        checkpoint,
        choice["num_attention_workers"],
        choice["num_expert_workers"],
        dtype=choice["dtype"],
        **quantize_settings(choice),
        workers={"mode": choice["mode"]},
        engine={name: choice[name] for name in (*engine.split(), "itl_target_ms")},
        transport={"transport": choice["transport"]},
    )


def quantize_settings(choice: Choice) -> dict[str, Any]:
    """Settings of the model's section."""
    quantize, _, layers = choice["quantize"].partition(" ")
    return {"quantize": quantize, "quantize_layers": layers or "experts"}


def requests(vocab_size: int) -> list[list[Request]]:
    """Two waves: the second goes on where the first ended up, and finds known prefixes."""
    first = [
        replace(request, params=replace(request.params, logprobs=vocab_size))
        for request in mixed_requests(vocab_size, count=9, max_tokens=10)
    ]
    second = [
        replace(request, request_id=f"again-{request.request_id}", prompt=(*request.prompt, 7, 8))
        for request in first
    ]
    return [first, second]


@cache
def expected(
    checkpoint: Path,
    dtype: str,
    kv_cache_dtype: KvCacheDType,
    deterministic: Deterministic,
    quantize: str,
) -> dict[str, list[TokenOutput]]:
    """What each request gives alone in one process, by name."""
    section = EngineSection(
        deterministic=deterministic, kv_cache_dtype=kv_cache_dtype, enable_prefix_caching=False
    )
    settings = quantize_settings({"quantize": quantize})
    engine = LocalEngine(checkpoint, dtype=dtype, section=section, **settings)
    found: dict[str, list[TokenOutput]] = {}
    for wave in requests(engine.config.vocab_size):
        for request in wave:
            ((key, outputs),) = engine.run([request]).items()
            found[key[0]] = outputs
    return found


def check(choice: Choice, checkpoint: Path) -> None:
    """Serve all requests in a cluster of threads. Raises ``AssertionError`` on a wrong answer."""
    names = ("dtype", "kv_cache_dtype", "deterministic", "quantize")
    known = expected(checkpoint, *(choice[name] for name in names))
    with serving(ThreadCluster(config_of(choice, checkpoint))) as cluster:
        snapshot = cluster.snapshot()
        vocab_size, is_exact = snapshot["model"]["vocab_size"], snapshot["results"]["exact"]
        assert is_exact or choice["deterministic"] != "on"
        for wave in requests(vocab_size):
            answers = cluster.answers(wave)
            for request in wave:
                found, wanted = answers[request.request_id].outputs, known[request.request_id]
                if is_exact:
                    assert exact(found) == exact(wanted), request.request_id
                else:
                    check_near(request, found, wanted, choice["dtype"])
        assert cluster.blocks_in_use() == 0


def check_near(
    request: Request, found: Sequence[TokenOutput], known: Sequence[TokenOutput], dtype: str
) -> None:
    """Assert that an answer is equal up to rounding: all logprobs, until the first near-tie.

    A near-tie is where rounding may decide for another token: a greedy one that is as good, or in
    bfloat16 a random one that lies at an edge of any token, under probabilities that agree.
    Answers have the whole vocabulary in ``top``.
    """
    name, rounding = request.request_id, ROUNDING[dtype]
    mine = [entry for output in found for entry in output.logprobs]
    other = [entry for output in known for entry in output.logprobs]
    assert len(mine) == len(other), name
    for place, (a, b) in enumerate(zip(mine, other, strict=True)):
        at = f"{name}, token {place}"
        probabilities = dict(b.top)
        assert abs(a.logprob - probabilities[a.token_id]) <= rounding, at
        if a.token_id == b.token_id:
            continue
        if request.params.temperature == 0:
            assert b.logprob - probabilities[a.token_id] <= 2 * rounding, at
        else:
            assert dtype == "bfloat16", at
            assert all(abs(p - probabilities[token]) <= rounding for token, p in a.top[:8]), at
        return
