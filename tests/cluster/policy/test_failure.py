"""The failure policy: which workers are lost."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
from msgspec.structs import replace

from benchmarks.harness.members import members_of
from cluster.policy.failure import (
    Liveness,
    PeerReport,
    confirm_losses,
    find_silent,
    silent_hosts,
)


def _pulse(
    name: str,
    heard_at: float,
    progress_at: float,
    *,
    waiting: bool = False,
    running: bool = True,
) -> Liveness:
    return Liveness(
        name=name, heard_at=heard_at, progress_at=progress_at, waiting=waiting, running=running
    )


def silent_for(seconds: str, limit: str) -> str:
    """The reason of a loss."""
    return f"no sign of life for {seconds} s (limit {limit} s)"


def test_silence_beyond_the_limit_is_a_loss() -> None:
    pulses = [_pulse("a", 10.0, 10.0), _pulse("b", 7.5, 7.5)]
    assert find_silent(10.0, pulses, "head", 2.0) == {"b": silent_for("2.5", "2")}


def test_silence_up_to_the_limit_is_no_loss() -> None:
    assert find_silent(10.0, [_pulse("a", 8.0, 8.0)], "head", 2.0) == {}


def test_a_standing_loop_under_a_live_heartbeat_is_a_loss() -> None:
    pulses = [_pulse("a", 10.0, 9.9), _pulse("b", 10.0, 7.0)]
    assert find_silent(10.0, pulses, "head", 2.0) == {
        "b": "its loop has stalled for 3.0 s (limit 2 s)",
    }


def test_a_loop_that_is_in_no_running_generation_may_stand() -> None:
    assert find_silent(10.0, [_pulse("a", 10.0, 1.0, running=False)], "head", 2.0) == {}


def test_a_worker_that_waits_for_a_silent_peer_is_not_blamed() -> None:
    pulses = [_pulse("waits", 10.0, 6.0, waiting=True), _pulse("frozen", 7.0, 6.0)]
    assert set(find_silent(10.0, pulses, "head", 2.0)) == {"frozen"}
    pulses = [_pulse("waits", 10.0, 6.0, waiting=True), _pulse("stuck", 10.0, 6.0)]
    assert set(find_silent(10.0, pulses, "head", 2.0)) == {"stuck"}


def test_a_worker_with_a_known_rhythm_is_lost_as_soon_as_its_gaps_explain_no_silence() -> None:
    silent = dataclasses.replace(_pulse("a", 10.0 - 0.31, 10.0), patience_s=0.3)
    assert find_silent(10.0, [silent], "head", 2.0) == {
        "a": "no sign of life for 0.3 s (limit 0.3 s)"
    }
    late = dataclasses.replace(_pulse("a", 10.0 - 0.69, 10.0), patience_s=0.7)
    assert find_silent(10.0, [late], "head", 2.0) == {}
    assert find_silent(10.02, [late], "head", 2.0) == {
        "a": "no sign of life for 0.7 s (limit 0.7 s)"
    }


@pytest.mark.parametrize(
    ("here", "expected"),
    [
        ([0.4, 0.05], "0"),
        ([0.4, 0.2], ""),  # both are late: the machine is busy
        ([0.4, 0.2, 0.05], ""),
        ([0.4, 0.4, 0.05, 0.05], ""),  # half of them
        ([0.4, 0.4, 0.05, 0.05, 0.05], "0 1"),
        ([0.4, 0.4, 0.4, 0.05, 0.05, 0.05], ""),
        ([0.4, 0.1875, 0.05], "0"),  # half of the patience of 0.375 s is not late
        ([0.376], "0"),  # the only one
        ([2.1, 1.9], "0"),  # the limit holds
        ([0.4, 0.4, 0.4, 0.05, 0.05, 0.05, 0.05], "0 1 2"),
    ],
)
def test_workers_that_are_late_together_at_the_controllers_host_have_the_whole_limit(
    here: list[float], expected: str
) -> None:
    def pulse(name: str, silence: float, host: str, running: bool = True) -> Liveness:
        return Liveness(
            name=name,
            heard_at=10.0 - silence,
            progress_at=10.0,
            waiting=False,
            running=running,
            host=host,
            patience_s=0.375,
        )

    pulses = [pulse(str(i), silence, "head") for i, silence in enumerate(here)]
    elsewhere = [pulse("a", 0.4, "h-1"), pulse("b", 0.4, "h-1")]
    starting = [pulse("c", 0.05, "head", running=False) for _ in range(4)]
    found = find_silent(10.0, [*pulses, *elsewhere, *starting], "head", 2.0)
    assert sorted(found) == [*expected.split(), "a", "b"]


def test_a_loop_has_the_whole_limit_whatever_the_rhythm() -> None:
    stuck = Liveness(
        name="a", heard_at=10.0, progress_at=8.0, waiting=False, running=True, patience_s=0.3
    )
    assert find_silent(10.0, [stuck], "head", 2.0) == {}
    assert set(find_silent(10.1, [stuck], "head", 2.0)) == {"a"}


HOSTS = {"attention-0": "h2", "attention-1": "h5", "expert-0": "h3", "expert-1": "h3"}


def _lost(*reports: str, hosts: Mapping[str, str] = HOSTS, **more: Any) -> dict[str, str]:
    """Who is lost when these reports came just within the limit: ``reporter suspect`` each."""
    members = {
        m.name: replace(m, node=hosts.get(m.name, m.name))
        for m in members_of({"attention": 2, "expert": 3})
    }
    pairs = [report.split() for report in reports]
    found = [PeerReport(reporter=a, suspect=b, reason="reset", at=10.0) for a, b in pairs]
    assert confirm_losses(10.125, found, members, 0.25, **more) == {}
    return confirm_losses(10.25, found, members, 0.25, **more)


def test_a_report_waits_for_its_confirmation() -> None:
    assert _lost("attention-0 expert-1") == {"expert-1": "attention-0 reports: reset"}


def test_of_two_that_name_each_other_the_expert_worker_is_lost() -> None:
    assert set(_lost("expert-1 attention-0", "attention-0 expert-1")) == {"expert-1"}


def test_an_expert_worker_that_alone_sees_a_bad_path_is_lost_itself() -> None:
    """What the other end had sent was acknowledged before: it waits, and sees nothing."""
    assert _lost("expert-1 attention-0") == {"expert-1": "has lost attention-0: reset"}


def test_the_end_of_most_bad_paths_is_lost() -> None:
    reports = ("expert-0 attention-0", "expert-2 attention-0")
    assert _lost(*reports) == {"attention-0": "expert-0 reports: reset"}
    assert set(_lost("attention-0 expert-2", "attention-1 expert-2")) == {"expert-2"}


def test_a_bad_path_between_two_hosts_is_one_for_all_workers_there() -> None:
    reports = ("expert-0 attention-0", "expert-1 attention-0")
    assert set(_lost(*reports)) == {"expert-0", "expert-1"}
    at_one_host = dict.fromkeys(HOSTS, "h1")
    assert set(_lost(*reports, hosts=at_one_host)) == {"attention-0"}


def test_who_was_not_heard_lately_is_lost_first() -> None:
    assert set(_lost("expert-1 attention-0", silent=["attention-0"])) == {"attention-0"}


def test_who_joins_is_lost_rather_than_who_serves() -> None:
    assert set(_lost("attention-1 expert-0", joins=["attention-1"])) == {"attention-1"}
    assert set(_lost("attention-0 attention-1", joins=["attention-0"])) == {"attention-0"}


def test_who_can_be_spared_is_lost_rather_than_who_cannot() -> None:
    """The only copies of experts are there."""
    found = _lost("attention-0 expert-0", can_spare=lambda names: "expert-0" not in names)
    assert set(found) == {"attention-0"}


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
        Liveness(
            name=f"{host}-{i}", heard_at=at, progress_at=at, waiting=False, running=True, host=host
        )
        for host, times in heard.items()
        for i, at in enumerate(times)
    ]
    found = silent_hosts(11.0, pulses, "head", 2.0)
    assert sorted(found) == expected.split()


@pytest.mark.parametrize(
    ("silences", "expected"),
    [
        ({"a": 0.38, "b": 0.2, "c": 0.05}, "a-0 b-0"),  # a is over its patience of 0.375 s
        ({"a": 0.375, "b": 0.375, "c": 0.05}, ""),
        ({"a": 0.38, "b": 0.1875, "c": 0.05}, ""),  # half of that
        ({"a": 0.38, "b": 0.2, "c": 0.2, "d": 0.05, "e": 0.05}, "a-0 b-0 c-0"),
        ({"a": 0.38, "b": 0.2, "c": 0.2, "d": 0.05, "e": 0.05, "f": 0.05}, ""),
        ({"a": 0.38, "b": 0.2, "c": 0.05, "d": 0.05}, ""),
        ({"a": 0.37, "b": 0.37, "c": 0.37}, ""),  # nobody is about to be lost
        ({"a": 0.37, "b": 0.37, "late": 0.38}, ""),  # who was late has more time
        ({"a": 0.05, "b": 0.6, "late": 1.1}, "b-0 late-0"),
        ({"a": 0.05, "late": 0.9, "late-2": 0.9}, ""),
        ({"a": 0.05, "late": 1.1, "late-2": 0.6}, "late-0 late-2-0"),  # half of the limit
    ],
)
def test_hosts_that_fall_silent_together_are_in_doubt_before_one_is_lost(
    silences: dict[str, float], expected: str
) -> None:
    pulses = [
        Liveness(
            name=f"{host}-0",
            heard_at=11.0 - silence,
            progress_at=11.0,
            waiting=False,
            running=True,
            host=host,
            patience_s=3.625 if host.startswith("late") else 0.375,
        )
        for host, silence in silences.items()
    ]
    found = silent_hosts(11.0, pulses, "head", 2.0)
    assert sorted(found) == expected.split()
