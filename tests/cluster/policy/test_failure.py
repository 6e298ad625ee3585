"""The failure policy: which workers are lost, and what the survivors do."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from cluster.core.placement import ExpertPlacement, contiguous
from cluster.core.topology import Generation, Member
from cluster.policy.coverage import (
    FailureDecision,
    Holdings,
    decide_members,
    describe_losses,
)
from cluster.policy.failure import (
    PeerReport,
    Pulse,
    confirm_suspect,
    find_silent,
    silent_hosts,
)
from tests.cluster.controller.fakes_cluster import BANKS, make_members, members_of

ROLES = {"attention-0": "attention", "expert-0": "expert", "expert-1": "expert"}
REDUNDANT = contiguous(BANKS, 3, num_redundant=3, epoch=7)


def without(
    members: tuple[Member, ...],
    placement: ExpertPlacement,
    *lost: str,
    highest_epoch: int = 1,
    **holdings: Any,
) -> FailureDecision:
    """The decision for the workers that are left."""
    survivors = [m for m in members if m.name not in lost]
    held = Holdings(current=placement, desired=placement, **holdings)
    return decide_members(survivors, held, highest_epoch=highest_epoch)


def test_experts_with_copies_elsewhere_go_on_in_a_new_epoch() -> None:
    decision = without(make_members(1, 3), REDUNDANT, "expert-1", highest_epoch=7)
    assert decision.can_run
    assert decision.loads == ()
    assert decision.placement.epoch == 8
    assert decision.placement.banks[0].physical_to_logical[1] == (-1,) * 6
    assert decision.effect == "go on with 1 attention and 2 expert workers, placement epoch 8"


def test_a_colocated_worker_takes_its_experts_and_its_rank_along() -> None:
    members = members_of({"colocated": 3})
    decision = without(members, REDUNDANT, "colocated-0")
    assert decision.can_run
    left = Generation(number=2, members=members[1:])
    assert [m.rank for m in left.attention] == [m.rank for m in left.experts] == [1, 2]
    assert left.leader.name == "colocated-1"
    assert decision.placement.banks[0].physical_to_logical[0] == (-1,) * 6
    assert decision.effect == "go on with 2 colocated workers, placement epoch 8"


def test_the_epoch_is_above_all_that_any_survivor_ran() -> None:
    decision = without(make_members(1, 3), REDUNDANT, "expert-1", highest_epoch=11)
    assert decision.placement.epoch == 12


def test_experts_without_copy_are_loaded_by_the_others() -> None:
    decision = without(make_members(1, 3), contiguous(BANKS, 3), "expert-0")
    assert decision.can_run
    assert decision.experts_complete
    assert sorted({load.device for load in decision.loads}) == [1, 2]
    assert len(decision.loads) == 6
    assert decision.effect == (
        "expert-1, expert-2 load 6 experts; "
        "go on with 1 attention and 2 expert workers, placement epoch 2"
    )


def test_the_last_colocated_worker_goes_on_alone() -> None:
    decision = without(members_of({"colocated": 2}), contiguous(BANKS, 2), "colocated-0")
    assert decision.effect == (
        "colocated-1 loads 8 experts; go on with 1 colocated worker, placement epoch 2"
    )


def test_an_expert_without_copy_and_without_room_is_named() -> None:
    placement = contiguous(BANKS, 3)
    decision = without(make_members(1, 3), placement, "expert-0", room=3)
    assert not decision.can_run
    assert not decision.experts_complete
    assert decision.placement == placement
    assert decision.loads == ()
    assert decision.effect == (
        "4 experts have no copy left, the first is expert 1 of bank mlp layer 0"
    )


def test_one_expert_without_copy_is_named_alone() -> None:
    placement = contiguous(BANKS[:1], 2)
    decision = without(make_members(1, 2), placement, "expert-0", room=7)
    assert decision.effect == "1 expert has no copy left, the first is expert 3 of bank mlp layer 0"


def test_a_lost_attention_worker_leaves_the_maps_alone() -> None:
    placement = contiguous(BANKS, 3)
    decision = without(make_members(2, 3), placement, "attention-0")
    assert decision.can_run
    assert decision.placement == placement


def test_without_attention_worker_nothing_runs() -> None:
    decision = without(make_members(1, 3), contiguous(BANKS, 3), "attention-0")
    assert not decision.can_run
    assert decision.experts_complete
    assert decision.effect == "no attention worker is left"


def test_without_attention_worker_nothing_is_loaded() -> None:
    placement = contiguous(BANKS, 3)
    decision = without(make_members(1, 3), placement, "attention-0", "expert-0")
    assert decision.loads == ()
    assert not decision.experts_complete
    assert decision.placement == placement


def test_two_workers_lost_at_once_are_both_in_the_cause() -> None:
    assert describe_losses({"expert-2": "closed", "expert-0": "closed"}) == (
        "lost expert-0: closed; lost expert-2: closed"
    )
    decision = without(make_members(1, 3), REDUNDANT, "expert-2", "expert-0", highest_epoch=7)
    assert decision.effect.endswith("go on with 1 attention and 1 expert worker, placement epoch 8")


def test_a_new_worker_brings_its_copies_back() -> None:
    less = without(make_members(1, 3), REDUNDANT, "expert-1", highest_epoch=7).placement
    holdings = Holdings(current=less, desired=REDUNDANT, joining={1: REDUNDANT})
    decision = decide_members(make_members(1, 3), holdings, highest_epoch=8)
    assert decision.placement == replace(REDUNDANT, epoch=9)
    assert decision.loads == ()


def _pulse(
    name: str,
    heard_at: float,
    progress_at: float,
    *,
    waiting: bool = False,
    running: bool = True,
) -> Pulse:
    return Pulse(
        name=name, heard_at=heard_at, progress_at=progress_at, waiting=waiting, running=running
    )


def test_silence_beyond_the_limit_is_a_loss() -> None:
    pulses = [_pulse("a", 10.0, 10.0), _pulse("b", 7.5, 7.5)]
    assert find_silent(10.0, pulses, 2.0) == {"b": "no heartbeat for 2.5 s (limit 2 s)"}


def test_silence_up_to_the_limit_is_no_loss() -> None:
    assert find_silent(10.0, [_pulse("a", 8.0, 8.0)], 2.0) == {}


def test_a_standing_loop_under_a_live_heartbeat_is_a_loss() -> None:
    pulses = [_pulse("a", 10.0, 9.9), _pulse("b", 10.0, 7.0)]
    assert find_silent(10.0, pulses, 2.0) == {
        "b": "its loop has stalled for 3.0 s (limit 2 s)",
    }


def test_a_loop_that_is_in_no_running_generation_may_stand() -> None:
    assert find_silent(10.0, [_pulse("a", 10.0, 1.0, running=False)], 2.0) == {}


def test_a_worker_that_waits_for_a_silent_peer_is_not_blamed() -> None:
    pulses = [_pulse("waits", 10.0, 6.0, waiting=True), _pulse("frozen", 7.0, 6.0)]
    assert set(find_silent(10.0, pulses, 2.0)) == {"frozen"}
    pulses = [_pulse("waits", 10.0, 6.0, waiting=True), _pulse("stuck", 10.0, 6.0)]
    assert set(find_silent(10.0, pulses, 2.0)) == {"stuck"}


def _report(reporter: str, suspect: str, at: float) -> PeerReport:
    return PeerReport(reporter=reporter, suspect=suspect, reason="reset", at=at)


def test_a_report_waits_for_its_confirmation() -> None:
    reports = [_report("attention-0", "expert-1", 10.0)]
    assert confirm_suspect(10.125, reports, ROLES, 0.25) is None
    found = confirm_suspect(10.25, reports, ROLES, 0.25)
    assert found is not None
    assert found.suspect == "expert-1"


def test_of_two_that_name_each_other_the_expert_worker_is_lost() -> None:
    reports = [
        _report("expert-1", "attention-0", 10.0),
        _report("attention-0", "expert-1", 10.0),
    ]
    found = confirm_suspect(10.3, reports, ROLES, 0.2)
    assert found is not None
    assert found.suspect == "expert-1"


def test_the_one_that_most_name_is_lost() -> None:
    reports = [
        _report("attention-0", "expert-0", 10.0),
        _report("attention-0", "expert-1", 10.0),
        _report("expert-0", "attention-0", 10.0),
        _report("expert-1", "attention-0", 10.0),
    ]
    found = confirm_suspect(10.3, reports, ROLES, 0.2)
    assert found is not None
    assert found.suspect == "attention-0"


@pytest.mark.parametrize(
    ("heard", "expected"),
    [
        ({"a": [9.0], "b": [9.0], "c": [10.9]}, "a-0 b-0"),
        ({"a": [9.0], "b": [10.9], "c": [10.9]}, ""),  # one host of three
        ({"a": [9.0], "b": [10.9]}, ""),  # half of the hosts
        ({"a": [9.0, 9.0]}, "a-0 a-1"),  # the only one, with two workers
        ({"a": [9.0]}, ""),  # one worker may just be frozen
        ({"a": [9.0, 10.9], "b": [9.0]}, ""),  # a host that is heard of is not silent
        ({"head": [9.0, 9.0]}, ""),  # the controller's own host
        ({"": [9.0, 9.0]}, ""),  # unknown
        ({"a": [10.1], "b": [10.1]}, ""),  # not for long
    ],
)
def test_the_controllers_own_host_is_in_doubt_when_most_others_are_silent(
    heard: dict[str, list[float]], expected: str
) -> None:
    pulses = [
        Pulse(
            name=f"{host}-{i}", heard_at=at, progress_at=at, waiting=False, running=True, host=host
        )
        for host, times in heard.items()
        for i, at in enumerate(times)
    ]
    found = silent_hosts(11.0, pulses, "head", 2.0)
    assert sorted(found) == expected.split()
