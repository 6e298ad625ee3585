"""The law of clusters: whatever moves rows between workers, the tokens are transformers' own.

Layout, mode, transport, micro-batches, spare slots and combine mode: few clusters have every pair
of their values, and a variant of a family runs in each of them. All variants run in all of them in
the long tier, and ``tests/long/parity.py`` has all layouts. Options of the engine
and bfloat16 are the law of ``test_option_pairs``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import product
from typing import Any

import pytest

from benchmarks.harness.serving_cluster import ThreadCluster, serving
from tests.harness.golden_clusters import check_greedy, float32_config
from tests.harness.option_matrix import Choice, pairs_of, pairwise
from tests.reference.goldens import BY_TURNS, IN_CLUSTERS, Golden

pytestmark = pytest.mark.heavy

OPTIONS: Mapping[str, tuple[Any, ...]] = {
    "layout": ((1, 1), (1, 3), (2, 2), (2, 3), (3, 4)),
    "mode": ("disaggregated", "colocated"),
    "transport": ("sockets", "collective"),
    "num_micro_batches": (1, 2),
    "num_redundant_experts": (0, 2),
    "combine_mode": ("sum", "per_slot"),
}
"""Layouts are (attention, expert) workers; of colocated workers there are as many as the latter."""
CHOICES = [
    choice
    for values in product(*OPTIONS.values())
    if (choice := dict(zip(OPTIONS, values, strict=True)))
    and not (choice["layout"] == (1, 1) and choice["num_redundant_experts"])  # no other device
]
PICKED = pairwise(CHOICES)


def cases() -> Iterator[Any]:
    """(variant, choice): each choice with one of the variants; the others are slow."""
    for place, variant in enumerate(BY_TURNS):
        for number, choice in enumerate(PICKED):
            is_quick = variant in IN_CLUSTERS and number == place % len(PICKED)
            marks = [] if is_quick else [pytest.mark.distributed, pytest.mark.slow]
            yield pytest.param(variant, choice, marks=marks, id=f"{variant}-{describe(choice)}")


def describe(choice: Choice) -> str:
    """Short words for a choice."""
    attention, experts = choice["layout"]
    return (
        f"{attention}x{experts}-{choice['mode']}-{choice['transport']}-{choice['combine_mode']}"
        f"-mb{choice['num_micro_batches']}-r{choice['num_redundant_experts']}"
    )


@pytest.mark.parametrize(("variant", "choice"), list(cases()))
def test_tokens_are_those_of_transformers(
    golden: Callable[[str], Golden], variant: str, choice: Choice
) -> None:
    attention, experts = choice["layout"]
    is_colocated = choice["mode"] == "colocated"
    config = float32_config(
        golden(variant),
        0 if is_colocated else attention,
        experts,
        workers={name: choice[name] for name in ("mode", "num_redundant_experts")},
        engine={name: choice[name] for name in ("num_micro_batches", "combine_mode")},
        transport={"transport": choice["transport"]},
    )
    with serving(ThreadCluster(config)) as cluster:
        check_greedy(cluster, golden(variant))


def test_every_pair_occurs() -> None:
    assert set().union(*map(pairs_of, PICKED)) == set().union(*map(pairs_of, CHOICES))
    assert len(PICKED) <= len(IN_CLUSTERS)
    default = [case.values for case in cases() if pytest.mark.slow not in case.marks]
    assert {variant for variant, _ in default} == {*IN_CLUSTERS}
    assert all(choice in [chosen for _, chosen in default] for choice in PICKED)
