"""The failure policy: which workers are lost."""

from __future__ import annotations

import pytest

from cluster.policy.failure import (
    PeerReport,
    Pulse,
    confirm_suspect,
    find_silent,
    silent_hosts,
)

ROLES = {"attention-0": "attention", "expert-0": "expert", "expert-1": "expert"}


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
