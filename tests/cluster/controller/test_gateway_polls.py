"""Gateways that stop asking are gone."""

from __future__ import annotations

from cluster.controller.gateway_polls import GatewayPolls


def test_a_gateway_that_stops_asking_is_gone_once() -> None:
    polls = GatewayPolls()
    assert not polls.begin("a")
    assert polls.take_gone(100.0) == []  # its question is open
    polls.begin("b")
    polls.end("a", 100.0)
    polls.end("b", 100.0)
    polls.begin("b")
    assert polls.take_gone(105.0) == []
    assert polls.take_gone(105.1) == ["a"]
    assert polls.take_gone(1000.0) == []


def test_a_gateway_that_asks_again_is_back_once() -> None:
    polls = GatewayPolls()
    polls.begin("a")
    polls.end("a", 100.0)
    assert polls.take_gone(110.0) == ["a"]
    assert polls.begin("a")
    polls.end("a", 111.0)
    assert not polls.begin("a")


def test_a_gateway_that_leaves_is_not_gone() -> None:
    polls = GatewayPolls()
    polls.begin("a")
    assert polls.leave("a")
    polls.end("a", 100.0)  # its last question, answered late
    assert polls.take_gone(200.0) == []
    assert not polls.leave("nobody")
