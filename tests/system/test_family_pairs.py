"""All families in few clusters that have every pair of values of the options which move rows.

Layout, mode, exchange, micro-batches, spare slots and combine mode: each pair of values occurs, in
every family, and the tokens are transformers' own. ``benchmarks/parity.py`` has the full layouts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import product
from typing import Any

import pytest

from tests.harness.option_matrix import Choice, pairs_of, pairwise
from tests.harness.serving_cluster import ThreadCluster, serving
from tests.reference.goldens import DOTS1_VARIANTS, JETMOE_VARIANTS, OLMOE_VARIANTS, Golden
from tests.system.test_layouts import check_greedy, float32_config

OPTIONS: Mapping[str, tuple[Any, ...]] = {
    "layout": ((1, 1), (1, 3), (2, 2), (3, 4)),
    "mode": ("disaggregated", "colocated"),
    "transport": ("sockets", "collective"),
    "num_micro_batches": (1, 2),
    "num_redundant_experts": (0, 2),
    "combine_mode": ("sum", "per_slot"),
}
"""Layouts are (attention, expert) workers; of colocated workers there are as many as the latter."""
FAMILIES = (OLMOE_VARIANTS, DOTS1_VARIANTS, JETMOE_VARIANTS)
CHOICES = [
    choice
    for values in product(*OPTIONS.values())
    if (choice := dict(zip(OPTIONS, values, strict=True)))
    and not (choice["layout"] == (1, 1) and choice["num_redundant_experts"])  # no other device
]
PICKED = pairwise(CHOICES)


def cases() -> Iterator[Any]:
    """(variant, choice): every picked choice with the next variant of each family.

    By default each choice has one of the families, by turns.
    """
    for place, family in enumerate(FAMILIES):
        for number, choice in enumerate(PICKED):
            variant = family[number % len(family)]
            marks = () if number % len(FAMILIES) == place else pytest.mark.slow
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


def test_every_pair_and_every_variant_occurs() -> None:
    assert set().union(*map(pairs_of, PICKED)) == set().union(*map(pairs_of, CHOICES))
    assert len(PICKED) <= 12
    seen = {variant for variant, _ in (case.values for case in cases())}
    for family in FAMILIES:
        assert len(seen & set(family)) == min(len(family), len(PICKED))
