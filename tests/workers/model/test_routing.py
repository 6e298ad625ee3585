"""Every way of scoring against plain Python, on random logits, groups and biases."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from tests.workers.native.builds import NAMES, library
from workers.model.layers import Linear
from workers.model.native.native_sublayer import routing_fields
from workers.model.routing import Router, Routing, Scoring

pytestmark = pytest.mark.heavy

GAP = 1e-4
"""Scores nearer to each other than this may come in any order."""
LOGITS = st.floats(-6, 6, width=32)


Choose = Callable[[Routing, list[float], Tensor | None], tuple[Tensor, Tensor]]
"""The routing of one row of logits -> ids and weights [1, k]."""


def by_torch(
    routing: Routing, logits: list[float], correction: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The router's matrix is the identity, so that a row is its logits."""
    router = Router(routing=routing, linear=Linear(torch.eye(len(logits))), correction=correction)
    routes = router.route(torch.tensor([logits, logits[::-1]]), None)
    assert routes.topk_ids.shape == routes.topk_weights.shape == (2, routing.top_k)
    return routes.topk_ids[0], routes.topk_weights[0]


def by_kernel(
    routing: Routing, logits: list[float], correction: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same bits on all instruction sets."""
    found: list[tuple[Tensor, Tensor]] = []
    fields = routing_fields(routing, correction)
    for name in NAMES:
        ids, weights = torch.full((routing.top_k,), -1), torch.full((routing.top_k,), -1.0)
        tensors = (torch.tensor(logits), ids, weights, torch.empty(3 * len(logits)))
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
        library(name).functions.routing_choose(ctypes.byref(fields), *pointers)
        found.append((ids, weights))
        assert torch.equal(ids, found[0][0])
        assert torch.equal(weights.nan_to_num(-2.0), found[0][1].nan_to_num(-2.0))
    return found[0]


WAYS = pytest.mark.parametrize("choose", [by_torch, by_kernel], ids=["torch", "kernel"])


def chosen(
    choose: Choose, routing: Routing, logits: list[float], correction: list[float]
) -> dict[int, float]:
    """Weight by expert."""
    ids, weights = choose(routing, logits, torch.tensor(correction) if correction else None)
    assert len(set(ids.tolist())) == routing.top_k, "an expert was chosen twice"
    return dict(zip(ids.tolist(), weights.tolist(), strict=True))


def best(scores: list[float], count: int) -> list[int]:
    """The highest, clear of the others."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    assume(count == len(scores) or scores[order[count - 1]] - scores[order[count]] > GAP)
    return order[:count]


def assert_weights(got: dict[int, float], want: dict[int, float]) -> None:
    assert got.keys() == want.keys()
    assert got == pytest.approx(want, rel=1e-4, abs=1e-6)


@WAYS
@given(data=st.data(), num_experts=st.integers(1, 24), is_normed=st.booleans())
def test_softmax_takes_the_best_of_all_probabilities(
    choose: Choose, data: st.DataObject, num_experts: int, is_normed: bool
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
    assert_weights(chosen(choose, routing, logits, []), {i: probabilities[i] / scale for i in ids})


@WAYS
@given(data=st.data(), num_experts=st.integers(1, 24), least_sum=st.sampled_from([0.0, 1e-12, 0.5]))
def test_a_correction_changes_softmaxs_choice_and_no_weight(
    choose: Choose, data: st.DataObject, num_experts: int, least_sum: float
) -> None:
    logits = data.draw(st.lists(LOGITS, min_size=num_experts, max_size=num_experts))
    noise = st.floats(-0.5, 0.5, width=32)
    biases = data.draw(st.lists(noise, min_size=num_experts, max_size=num_experts))
    top_k = data.draw(st.integers(1, num_experts))
    total = sum(math.exp(x) for x in logits)
    probabilities = [math.exp(x) / total for x in logits]
    ids = best([p + b for p, b in zip(probabilities, biases, strict=True)], top_k)
    scale = max(sum(probabilities[i] for i in ids), least_sum)
    routing = Routing(
        bank=0,
        num_experts=num_experts,
        top_k=top_k,
        scoring="softmax",
        is_normed=True,
        least_sum=least_sum,
    )
    found = chosen(choose, routing, logits, biases)
    assert_weights(found, {i: probabilities[i] / scale for i in ids})


@WAYS
@given(data=st.data(), num_experts=st.integers(1, 16))
def test_softmax_of_best_weighs_the_chosen_alone(
    choose: Choose, data: st.DataObject, num_experts: int
) -> None:
    logits = data.draw(st.lists(LOGITS, min_size=num_experts, max_size=num_experts))
    top_k = data.draw(st.integers(1, num_experts))
    ids = best(logits, top_k)
    total = sum(math.exp(logits[i]) for i in ids)
    routing = Routing(bank=0, num_experts=num_experts, top_k=top_k, scoring="softmax_of_best")
    assert_weights(
        chosen(choose, routing, logits, []), {i: math.exp(logits[i]) / total for i in ids}
    )


@WAYS
@given(
    data=st.data(),
    num_groups=st.integers(1, 6),
    group_size=st.integers(2, 6),
    is_normed=st.booleans(),
    scale=st.sampled_from([1.0, 2.5]),
    shift=st.sampled_from([0.0, -2.0]),
)
def test_sigmoid_chooses_within_its_best_groups(
    choose: Choose,
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
    assert_weights(
        chosen(choose, routing, logits, biases), {i: scores[i] / total * scale for i in ids}
    )


@WAYS
@given(
    data=st.data(),
    num_groups=st.integers(1, 6),
    group_size=st.integers(2, 6),
    scale=st.sampled_from([1.0, 16.0]),
)
def test_float32_softmax_chooses_within_the_groups_of_the_best(
    choose: Choose, data: st.DataObject, num_groups: int, group_size: int, scale: float
) -> None:
    num_experts = num_groups * group_size
    logits = data.draw(st.lists(LOGITS, min_size=num_experts, max_size=num_experts))
    top_groups = data.draw(st.integers(1, num_groups))
    top_k = data.draw(st.integers(1, top_groups * group_size))
    groups = [range(g * group_size, (g + 1) * group_size) for g in range(num_groups)]
    kept = {
        i
        for g in best([max(logits[i] for i in group) for group in groups], top_groups)
        for i in groups[g]
    }
    ids = best([x if i in kept else -100.0 for i, x in enumerate(logits)], top_k)
    total = sum(math.exp(x) for x in logits)
    routing = Routing(
        bank=0,
        num_experts=num_experts,
        top_k=top_k,
        scoring="float32_softmax",
        scale=scale,
        num_groups=num_groups,
        top_groups=top_groups,
    )
    found = chosen(choose, routing, logits, [])
    assert_weights(found, {i: math.exp(logits[i]) / total * scale for i in ids})


@pytest.mark.parametrize("scoring", ["softmax", "softmax_of_best", "sigmoid", "float32_softmax"])
def test_logits_that_are_no_numbers_choose_valid_experts(scoring: Scoring) -> None:
    """The weights are no numbers, which fails the request; the ids must not break the exchange."""
    routing = Routing(bank=0, num_experts=6, top_k=4, scoring=scoring, num_groups=3, top_groups=2)
    for logits in ([math.nan] * 6, [1.0, math.nan, 2.0, math.inf, -math.inf, math.nan]):
        ids, weights = by_kernel(routing, logits, None)
        assert len(set(ids.tolist())) == 4
        assert ids.min() >= 0
        assert ids.max() < 6
        assert weights.isnan().any()
