"""The lease and the term, on a clock that is set by hand."""

from __future__ import annotations

import pytest

from cluster.core.errors import ProtocolError
from workers.process.control.lease import Lease, TermGuard


class Owner:
    """A worker's commits, and the calls of its lease."""

    def __init__(self) -> None:
        self.committed = 0.0
        self.expired: list[str] = []
        self.clock = Lease(3.6, lambda: self.committed, self.expired.append)


def test_an_acknowledgement_renews_from_the_time_of_its_heartbeat() -> None:
    owner = Owner()
    first, second = owner.clock.record_heartbeat(1.0), owner.clock.record_heartbeat(2.0)
    owner.clock.acknowledge(first)
    assert owner.clock.contact_at == 1.0
    owner.clock.check(4.6)
    assert owner.expired == []
    owner.clock.check(4.7)
    assert owner.expired == ["no contact with the controller and no step for 3.7 s"]
    owner.clock.acknowledge(second)
    assert owner.clock.contact_at == 2.0


def test_it_expires_once_until_it_is_renewed() -> None:
    owner = Owner()
    owner.clock.check(4.0)
    owner.clock.check(5.0)
    assert len(owner.expired) == 1
    owner.clock.acknowledge(owner.clock.record_heartbeat(5.5))
    owner.clock.check(9.0)
    assert len(owner.expired) == 1
    owner.clock.check(9.2)
    assert len(owner.expired) == 2


def test_an_acknowledgement_that_renews_nothing_does_not_let_it_expire_again() -> None:
    owner = Owner()
    number = owner.clock.record_heartbeat(1.0)
    owner.clock.check(10.0)  # the process was stopped
    owner.clock.acknowledge(number)
    owner.clock.check(10.1)
    assert len(owner.expired) == 1


def test_it_expires_again_after_a_step_without_a_controller() -> None:
    owner = Owner()
    owner.clock.check(4.0)
    owner.committed = 5.0
    owner.clock.check(9.0)
    assert len(owner.expired) == 2


def test_a_committed_step_renews_it_without_a_controller() -> None:
    owner = Owner()
    for second in range(1, 20):
        owner.committed = float(second)
        owner.clock.check(second + 3.0)
    assert owner.expired == []


@pytest.mark.parametrize("number", [0, 1, 99])
def test_an_acknowledgement_of_no_open_heartbeat_renews_nothing(number: int) -> None:
    owner = Owner()
    owner.clock.acknowledge(owner.clock.record_heartbeat(1.0))
    owner.clock.record_heartbeat(2.0)
    owner.clock.acknowledge(number)
    assert owner.clock.contact_at == 1.0


def test_a_lease_without_a_limit_does_not_expire() -> None:
    expired: list[str] = []
    clock = Lease(on_expired=expired.append)
    clock.check(1e9)
    assert expired == []


def test_the_highest_term_is_followed_and_one_controller_of_it() -> None:
    guard = TermGuard()
    guard.check(1, "first")
    guard.check(1, "first")
    with pytest.raises(ProtocolError, match="another controller of the same term 1"):
        guard.check(1, "second")
    guard.check(3, "second")
    assert guard.term == 3
    with pytest.raises(ProtocolError, match="a controller of the older term 1, not 3"):
        guard.check(1, "first")
    with pytest.raises(ProtocolError, match="another controller of the same term 3"):
        guard.check(3, "first")
