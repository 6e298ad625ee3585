"""Every way of scoring against plain Python, on random logits, groups and biases."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from workers.model.layers import Linear
from workers.model.routing import Router, Routing

GAP = 1e-4
"""Scores nearer to each other than this may come in any order."""
LOGITS = st.floats(-6, 6, width=32)


def chosen(routing: Routing, logits: list[float], correction: list[float]) -> dict[int, float]:
    """Weight by expert; the router's matrix is the identity, so that a row is its logits."""
    router = Router(
        routing=routing,
        linear=Linear(torch.eye(len(logits))),
        correction=torch.tensor(correction) if correction else None,
    )
    routes = router.route(torch.tensor([logits, logits[::-1]]), None)
    ids, weights = routes.topk_ids, routes.topk_weights
    assert ids.shape == weights.shape == (2, routing.top_k)
    assert len(set(ids[0].tolist())) == routing.top_k, "an expert was chosen twice"
    return dict(zip(ids[0].tolist(), weights[0].tolist(), strict=True))


def best(scores: list[float], count: int) -> list[int]:
    """The highest, clear of the others."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    assume(count == len(scores) or scores[order[count - 1]] - scores[order[count]] > GAP)
    return order[:count]


def assert_weights(got: dict[int, float], want: dict[int, float]) -> None:
    assert got.keys() == want.keys()
    assert got == pytest.approx(want, rel=1e-4, abs=1e-6)


@given(data=st.data(), num_experts=st.integers(1, 24), is_normed=st.booleans())
def test_softmax_takes_the_best_of_all_probabilities(
    data: st.DataObject, num_experts: int, is_normed: bool
) -> None:
    logits = data.draw(st.lists(LOGITS, min_size=num_experts, max_size=num_experts))
    top_k = data.draw(st.integers(1, num_experts))
    total = sum(math.exp(x) for x in logits)
    probabilities = [math.exp(x) / total for x in logits]
    ids = best(probabilities, top_k)
    scale = sum(probabilities[i] for i in ids) if is_normed else 1.0
    routing = Routing(
        bank=0, num_experts=num_experts, top_k=top_k, scoring="softmax", is_normed=is_normed
    )
    assert_weights(chosen(routing, logits, []), {i: probabilities[i] / scale for i in ids})


@given(data=st.data(), num_experts=st.integers(1, 16))
def test_softmax_of_best_weighs_the_chosen_alone(data: st.DataObject, num_experts: int) -> None:
    logits = data.draw(st.lists(LOGITS, min_size=num_experts, max_size=num_experts))
    top_k = data.draw(st.integers(1, num_experts))
    ids = best(logits, top_k)
    total = sum(math.exp(logits[i]) for i in ids)
    routing = Routing(bank=0, num_experts=num_experts, top_k=top_k, scoring="softmax_of_best")
    assert_weights(chosen(routing, logits, []), {i: math.exp(logits[i]) / total for i in ids})


@given(
    data=st.data(),
    num_groups=st.integers(1, 6),
    group_size=st.integers(2, 6),
    is_normed=st.booleans(),
    scale=st.sampled_from([1.0, 2.5]),
    shift=st.sampled_from([0.0, -2.0]),
)
def test_sigmoid_chooses_within_its_best_groups(
    data: st.DataObject,
    num_groups: int,
    group_size: int,
    is_normed: bool,
    scale: float,
    shift: float,
) -> None:
    num_experts = num_groups * group_size
    logits = data.draw(st.lists(LOGITS, min_size=num_experts, max_size=num_experts))
    noise = st.floats(-0.5, 0.5, width=32)
    drawn = data.draw(st.lists(noise, min_size=num_experts, max_size=num_experts))
    biases = [x + shift for x in drawn]
    top_groups = data.draw(st.integers(1, num_groups))
    top_k = data.draw(st.integers(1, top_groups * group_size))
    scores = [1 / (1 + math.exp(-x)) for x in logits]
    choice = [s + b for s, b in zip(scores, biases, strict=True)]
    groups = [range(g * group_size, (g + 1) * group_size) for g in range(num_groups)]
    group_scores = [sum(sorted(choice[i] for i in group)[-2:]) for group in groups]
    kept = {i for g in best(group_scores, top_groups) for i in groups[g]}
    allowed = [c if i in kept else -100.0 for i, c in enumerate(choice)]
    ids = best(allowed, top_k)
    total = sum(scores[i] for i in ids) if is_normed else 1.0
    routing = Routing(
        bank=0,
        num_experts=num_experts,
        top_k=top_k,
        scoring="sigmoid",
        is_normed=is_normed,
        scale=scale,
        num_groups=num_groups,
        top_groups=top_groups,
    )
    assert_weights(chosen(routing, logits, biases), {i: scores[i] / total * scale for i in ids})
