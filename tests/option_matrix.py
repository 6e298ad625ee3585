"""Every combination of the engine's options, and the check that none of them changes an answer.

``pairwise`` picks few combinations in which every possible pair of values occurs: most faults of
options show with two of them. ``python -m benchmarks.matrix`` runs them all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import combinations, product
from pathlib import Path
from typing import Any

from cluster.config import ClusterConfig, EngineSection
from tests.exact import exact, mixed_requests
from tests.serving_cluster import ThreadCluster, make_config, serving
from workers.local_engine import LocalEngine
from workers.request import Request, TokenOutput

OPTIONS: Mapping[str, tuple[Any, ...]] = {
    "mode": ("local", "disaggregated", "colocated"),
    "num_micro_batches": (1, 2),
    "enable_prefix_caching": (False, True),
    "deterministic": (False, True),
    "combine_mode": ("sum", "per_slot"),
    "transport": ("sockets", "collective"),
    "dtype": ("float32", "bfloat16"),
    "num_attention_workers": (1, 2),
    "num_expert_workers": (1, 2),
    "itl_target_ms": (None, 5.0),
}
"""Values by option."""
ROUNDING = {"float32": 1e-3, "bfloat16": 0.125}
"""Largest difference of logprobs of runs that add up in different orders (bfloat16: four units in
the last bit of 8.0)."""
MAY_DIFFER = {"float32": 1, "bfloat16": 6}
"""Of 18 answers: a float32 draw at the edge of a token, or a bfloat16 router that takes its second
best expert, changes all that follows. Which rows meet in a step, and so how they are rounded,
depends on time."""
Choice = Mapping[str, Any]
"""One value for each option."""


def is_possible(choice: Choice) -> bool:
    """Whether the values make a cluster of their own, and not one that others describe too."""
    attention, experts = choice["num_attention_workers"], choice["num_expert_workers"]
    if choice["deterministic"] and choice["combine_mode"] != "per_slot":
        return False  # implied
    match choice["mode"]:
        case "local":
            combine = "per_slot" if choice["deterministic"] else "sum"
            alone = (attention, experts, choice["transport"]) == (1, 1, "sockets")
            return alone and choice["combine_mode"] == combine  # no data plane: no choice
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
    switches = ("enable_prefix_caching", "deterministic")
    words = [
        choice["mode"],
        f"{choice['num_attention_workers']}x{choice['num_expert_workers']}",
        choice["transport"],
        choice["dtype"],
        choice["combine_mode"],
        f"mb{choice['num_micro_batches']}",
        *[name.split("_")[-1] for name in switches if choice[name]],
    ]
    return "-".join(words + (["itl"] if choice["itl_target_ms"] else []))


def config_of(choice: Choice, checkpoint: Path) -> ClusterConfig:
    """The configuration of a combination."""
    engine = ("num_micro_batches", "enable_prefix_caching", "deterministic", "combine_mode")
    return make_config(
        checkpoint,
        choice["num_attention_workers"],
        choice["num_expert_workers"],
        dtype=choice["dtype"],
        workers={"mode": choice["mode"]},
        engine={name: choice[name] for name in (*engine, "itl_target_ms")},
        transport={"transport": choice["transport"]},
    )


def requests(vocab_size: int) -> list[list[Request]]:
    """Two waves: the second goes on where the first ended up, and finds known prefixes."""
    first = mixed_requests(vocab_size, count=9, max_tokens=10)
    second = [
        replace(request, request_id=f"again-{request.request_id}", prompt=(*request.prompt, 7, 8))
        for request in first
    ]
    return [first, second]


@cache
def expected(checkpoint: Path, dtype: str, deterministic: bool) -> dict[str, list[TokenOutput]]:
    """What each request gives alone in one process, by name."""
    section = EngineSection(deterministic=deterministic, enable_prefix_caching=False)
    engine = LocalEngine(checkpoint, dtype=dtype, section=section)
    found: dict[str, list[TokenOutput]] = {}
    for wave in requests(engine.config.vocab_size):
        for request in wave:
            ((key, outputs),) = engine.run([request]).items()
            found[key[0]] = outputs
    return found


def check(choice: Choice, checkpoint: Path) -> None:
    """Serve all requests in a cluster of threads. Raises ``AssertionError`` on a wrong answer."""
    known = expected(checkpoint, choice["dtype"], choice["deterministic"])
    num_apart = 0
    with serving(ThreadCluster(config_of(choice, checkpoint))) as cluster:
        vocab_size = cluster.snapshot()["model"]["vocab_size"]
        for wave in requests(vocab_size):
            answers = cluster.answers(wave)
            for request in wave:
                name = request.request_id
                if choice["deterministic"]:
                    assert exact(answers[name].outputs) == exact(known[name]), name
                else:
                    rounding = ROUNDING[choice["dtype"]]
                    is_near = _is_near(request, answers[name].outputs, known[name], rounding)
                    num_apart += not is_near
        assert cluster.blocks_in_use() == 0
    assert num_apart <= MAY_DIFFER[choice["dtype"]], f"{num_apart} answers differ"


def _is_near(
    request: Request, found: Sequence[TokenOutput], known: Sequence[TokenOutput], rounding: float
) -> bool:
    """Whether an answer is equal up to rounding.

    Rounding may change a token, and all that follow it: a greedy one only for another that is as
    good, while a random one may lie at an edge of any token.
    """
    name, is_greedy = request.request_id, request.params.temperature == 0
    mine = [entry for output in found for entry in output.logprobs]
    other = [entry for output in known for entry in output.logprobs]
    assert len(mine) == len(other), name
    for a, b in zip(mine, other, strict=True):
        if a.token_id != b.token_id:
            if not is_greedy:
                return rounding > ROUNDING["float32"]  # in bfloat16 that happens often
            return b.logprob - dict(b.top).get(a.token_id, float("-inf")) <= 2 * rounding
        if abs(a.logprob - b.logprob) > rounding:
            return False
    return True
