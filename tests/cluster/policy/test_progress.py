"""For which workers steps wait."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.policy.progress import SILENT_S, STALL_S, StepProgress, find_late

NOW = 100.0


def pace(
    name: str, stalled_s: float | None = None, *waits_for: str, silent_s: float = 0.1
) -> StepProgress:
    return StepProgress(
        name=name,
        heard_at=NOW - silent_s,
        runs_attention=not name.startswith("expert"),
        stalled_s=stalled_s,
        waits_for=waits_for,
    )


def late(*paces: StepProgress) -> tuple[str, ...]:
    return find_late(NOW, paces)


def test_nobody_is_late_while_no_step_is_wanted() -> None:
    assert late(pace("attention-0"), pace("expert-0", None, "attention-0")) == ()


@pytest.mark.parametrize(
    ("stalled_s", "expected"), [(STALL_S - 0.01, ()), (STALL_S, ("expert-1",))]
)
def test_who_is_waited_for_is_late(stalled_s: float, expected: tuple[str, ...]) -> None:
    waiting = pace("attention-0", stalled_s, "expert-1")
    assert late(waiting, pace("expert-0"), pace("expert-1")) == expected


def test_a_worker_that_computes_is_progress_of_all() -> None:
    waiting = pace("attention-0", 30.0, "expert-1")
    assert late(waiting, pace("expert-1", 0.0)) == ()
    assert late(waiting, pace("expert-1", 0.0, silent_s=1.2)) == ("expert-1",)


def test_a_silent_worker_is_late_before_those_who_wait() -> None:
    waiting = pace("attention-0", STALL_S, "expert-0", "expert-1")
    assert late(waiting, pace("expert-0"), pace("expert-1", silent_s=1.0)) == ("expert-1",)


def test_a_silent_worker_is_late_though_no_step_is_wanted() -> None:
    assert late(pace("attention-0"), pace("expert-1", silent_s=SILENT_S)) == ("expert-1",)
    assert late(pace("attention-0", silent_s=SILENT_S), pace("expert-1")) == ("attention-0",)


def test_a_worker_that_hangs_in_itself_is_late() -> None:
    waiting = pace("attention-0", 1.0, "expert-0", "expert-1")
    others = pace("expert-0", 1.0, "attention-0"), pace("expert-1", 1.0)
    assert late(waiting, *others) == ("expert-1",)
    assert late(pace("attention-0", 1.0)) == ("attention-0",)


def test_a_chain_of_waits_ends_at_the_late_worker() -> None:
    """The leader waits for the proposal of a rank that is in a step with an expert worker."""
    leader = pace("attention-0", 1.0, "attention-1")
    assert late(leader, pace("attention-1", 1.0, "expert-1"), pace("expert-1")) == ("expert-1",)


def test_an_idle_worker_that_sends_headers_on_is_not_late() -> None:
    """A leaf wants a step; the worker above it only waits for the leader, or for what that waits
    for."""
    leaf, above = pace("attention-6", 1.0, "attention-2"), pace("attention-2", None, "attention-0")
    assert late(pace("attention-0"), above, leaf) == ("attention-0",)
    leader = pace("attention-0", 1.0, "expert-1")
    assert late(leader, above, leaf, pace("expert-1")) == ("expert-1",)
    assert late(pace("attention-0", None, "attention-2"), above, leaf) == ("attention-2",)


def test_where_two_wait_for_each_other_attention_tells() -> None:
    waiting = pace("attention-0", 1.0, "expert-1")
    assert late(waiting, pace("expert-1", 1.0, "attention-0")) == ("expert-1",)


def test_an_expert_worker_alone_waits_for_nothing_that_is_wanted() -> None:
    """Its step was given up by the others, and no request waits."""
    assert late(pace("attention-0"), pace("expert-1", 5.0, "attention-0")) == ()


def in_group(group: str, found: StepProgress) -> StepProgress:
    return replace(found, group=group)


def test_a_step_group_that_advances_does_not_hide_another_one() -> None:
    """An expert worker that serves the other group at present is not late."""
    decode = in_group("decode", pace("attention-1", 0.1))
    hung = in_group("prefill", pace("attention-0", STALL_S))
    assert late(decode, hung, pace("expert-0", 0.1)) == ("attention-0",)
    waiting = in_group("prefill", pace("attention-0", STALL_S, "expert-0"))
    assert late(decode, waiting, pace("expert-0", STALL_S)) == ("expert-0",)
    assert late(decode, waiting, pace("expert-0", 0.1)) == ()
