"""Which arithmetic workers agree on, and what ends exactness."""

from __future__ import annotations

import pytest

from benchmarks.harness.members import member_of
from cluster.core.arithmetic import ArithmeticAgreement, ArithmeticOffer, agree
from cluster.core.topology import Generation

DOT, FMA = "bfloat16-dot 1", "bfloat16-fma 2"
BOTH = ArithmeticOffer(kernels=(DOT, FMA))
OLD = ArithmeticOffer(kernels=(FMA,))


@pytest.mark.parametrize(
    ("offers", "expected"),
    [
        ({"a": BOTH, "b": BOTH}, DOT),
        ({"a": BOTH, "b": OLD}, FMA),
        ({"a": OLD, "b": BOTH}, FMA),
        ({"a": OLD}, FMA),
    ],
)
def test_the_best_common_arithmetic_is_taken(
    offers: dict[str, ArithmeticOffer], expected: str
) -> None:
    assert agree(offers) == ArithmeticAgreement(kernels=expected, reason="")


@pytest.mark.parametrize(
    ("offers", "reason"),
    [
        ({}, "no worker has reported its arithmetic"),
        (
            {"a": BOTH, "b": ArithmeticOffer(obstacle="computes experts with torch (on CUDA)")},
            "b computes experts with torch (on CUDA)",
        ),
        (
            {"a": OLD, "b": ArithmeticOffer(kernels=(DOT,))},
            f"b computes with {DOT}, the others with {FMA}",
        ),
        (
            {
                "a": ArithmeticOffer(kernels=(FMA,), torch="x"),
                "b": ArithmeticOffer(kernels=(FMA,), torch="y"),
            },
            "torch computes otherwise on b (y, x)",
        ),
    ],
)
def test_without_a_common_one_the_reason_is_said(
    offers: dict[str, ArithmeticOffer], reason: str
) -> None:
    found = agree(offers)
    assert not found.is_exact
    assert found.reason == reason
    assert found.to_dict() == {"exact": False, "arithmetic": "", "reason": reason}


def test_what_torch_computes_counts_where_it_counts() -> None:
    offers = {"expert-0": OLD, "attention-0": ArithmeticOffer(kernels=(FMA,), torch="x")}
    assert agree(offers) == ArithmeticAgreement(kernels=FMA, torch="x", reason="")


def test_later_generations_keep_the_arithmetic() -> None:
    first = agree({"a": ArithmeticOffer(kernels=(DOT, FMA), torch="x"), "b": OLD})
    assert agree({"a": BOTH}, first) == first, "not the better one, though all have it by now"
    assert agree({"c": ArithmeticOffer(kernels=(DOT,))}, first).reason == (
        f"c computes with {DOT}, the others with {FMA}"
    )
    assert not agree({"c": ArithmeticOffer(kernels=(FMA,), torch="y")}, first).is_exact


def test_exactness_that_has_ended_does_not_come_back() -> None:
    ended = agree({"a": BOTH, "b": ArithmeticOffer()}, agree({"a": BOTH}))
    assert ended.reason == "b has not reported its arithmetic"
    assert agree({"a": BOTH}, ended) == ended


def test_generations_hand_the_agreement_on() -> None:
    none = Generation(number=0, members=())
    members = [member_of("attention-0", offer=BOTH), member_of("expert-0", offer=OLD)]
    first = none.successor(members)
    assert (first.number, first.agreement.kernels) == (1, FMA)
    assert not first.returns_slots, "one expert rank adds up in the order of the slots"
    second = first.successor([*members, member_of("expert-1", offer=BOTH)])
    assert (second.number, second.agreement) == (2, first.agreement)
    assert second.returns_slots
    third = second.successor([*members, member_of("expert-1", offer=ArithmeticOffer())])
    assert not third.agreement.is_exact
    assert not third.returns_slots
