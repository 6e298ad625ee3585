"""Places that wait for a drained node to go."""

from __future__ import annotations

from cluster.controller.drain.cordon import Cordon
from cluster.controller.parts.cluster import NodeIds


def nodes(**ids: str) -> NodeIds:
    """``nodes(a="12")``: nodes 1 and 2 are at address a."""
    return {address: frozenset(found) for address, found in ids.items()}


def kept(alive: NodeIds | None = None) -> Cordon:
    """Two workers of host a have left."""
    places = Cordon()
    if alive is not None:
        assert places.take_gone(alive) == []
    places.add(["expert-0", "expert-1"], "a")
    return places


def test_a_node_that_goes_frees_its_places_once() -> None:
    places = kept(nodes(a="1", b="2"))
    assert places.take_gone(nodes(a="1", b="2")) == []
    assert places.take_gone(nodes(b="2")) == ["expert-0", "expert-1"]
    assert places.take_gone(nodes(b="2")) == []


def test_a_host_that_is_back_before_it_was_missed() -> None:
    places = kept(nodes(a="1"))
    assert places.take_gone(nodes(a="12")) == []  # Ray has not noticed the end of 1 yet
    assert places.take_gone(nodes(a="2")) == ["expert-0", "expert-1"]


def test_who_has_never_looked_takes_the_first_node_for_the_drained_one() -> None:
    places = kept()
    assert places.take_gone(nodes(a="1")) == []
    assert places.take_gone(nodes(a="2")) == ["expert-0", "expert-1"]


def test_another_controller_knows_it_too() -> None:
    places = Cordon()
    places.restore(kept(nodes(a="1")).memory())
    assert places.take_gone(nodes(a="2")) == ["expert-0", "expert-1"]
