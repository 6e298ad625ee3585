"""When a fleet may end: no gateway can have a call on it."""

from __future__ import annotations

from cluster.launch.gateway_calls import GatewayCalls


def test_only_gateways_that_know_the_table_and_run_no_call_let_a_fleet_end() -> None:
    gateways = GatewayCalls(now_s=100.0, settle_s=10.0)
    assert not gateways.have_ended("f", 3, 109.0), "gateways may not have polled yet"
    assert gateways.have_ended("f", 3, 110.0)
    gateways.poll("a", 2, {}, 110.0)
    assert not gateways.have_ended("f", 3, 110.0), "it does not know the table"
    gateways.poll("a", 3, {"f": 1}, 111.0)
    assert not gateways.have_ended("f", 3, 111.0)
    assert gateways.have_ended("other", 3, 111.0)
    gateways.poll("a", 3, {"f": 0}, 112.0)
    assert gateways.have_ended("f", 3, 112.0)
    gateways.poll("b", 1, {"f": 1}, 112.0)
    for now_s in range(117, 141, 5):
        gateways.poll("a", 3, {}, now_s)
        assert not gateways.have_ended("f", 3, now_s)
    assert gateways.have_ended("f", 3, 142.0), "a silent gateway has ended"


def test_after_a_pause_of_the_actor_all_gateways_are_awaited_again() -> None:
    gateways = GatewayCalls(now_s=100.0, settle_s=10.0)
    gateways.poll("a", 3, {}, 110.0)
    gateways.poll("b", 3, {"f": 1}, 110.0)
    gateways.poll("a", 3, {}, 160.0)  # the process was stopped for 50 s
    assert not gateways.have_ended("f", 3, 160.0), "b has had no time to poll"
    gateways.poll("b", 3, {"f": 1}, 162.0)
    for now_s in range(165, 190, 5):
        gateways.poll("a", 3, {}, now_s)
        assert not gateways.have_ended("other", 3, now_s), "further ones may poll late"
    gateways.poll("b", 3, {"f": 1}, 190.0)
    assert gateways.have_ended("other", 3, 190.0)
    assert not gateways.have_ended("f", 3, 190.0)
    gateways.poll("b", 3, {}, 191.0)
    assert gateways.have_ended("f", 3, 191.0)
