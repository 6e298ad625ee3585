"""Which places are empty, and when a worker is started for them."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from cluster.core.states import IllegalTransitionError
from cluster.policy.places import NodeIds, Places, PlaceState
from tests.cluster.controller.fakes_cluster import make_members

MEMBERS = make_members(1, 2)


def due(places: Places, now: float) -> list[str]:
    return [member.name for member in places.take_due(now)]


def left_out(place: str) -> Places:
    """Four of its workers died at 0 s, three of them while starting."""
    places = Places(MEMBERS)
    for name in (place, f"{place}.2", f"{place}.3", f"{place}.4"):
        places.lost(name, "killed", 0.0)
        places.take_due(100.0)
    return places


def test_losses_in_quick_succession_are_answered_later_and_later() -> None:
    places = Places(MEMBERS)
    assert due(places, 0.0) == []
    name, now, delays = "expert-1", 100.0, []
    for number in range(2, 9):
        places.lost(name, "killed", now)
        name = f"expert-1.{number}"
        began = now
        while not (found := due(places, now)):
            now += 0.5
        assert found == [name]
        delays.append(now - began)
        places.joined([replace(MEMBERS[2], name=name)])
    assert delays == [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0]
    places.lost(name, "killed", now + 300.0)
    assert due(places, now + 300.0) == ["expert-1.9"]


def test_deaths_while_starting_count_until_one_serves() -> None:
    places = Places(MEMBERS)
    name, now = "expert-0", 0.0
    for number in range(2, 8):
        places.lost(name, "killed", now)
        now += 100.0
        name = f"expert-0.{number}"
        assert due(places, now) == [name]
        if number % 3 == 1:
            places.joined([replace(MEMBERS[1], name=name)])
    assert places.closed == {}
    for number in (8, 9, 10):
        places.lost(name, f"killed {number}", now)
        assert places.are_due
        now += 100.0
        name = f"expert-0.{number}"
        assert due(places, now) == [name]
    assert not places.are_due
    places.lost(name, "once more", now)
    assert due(places, now + 299.0) == []
    assert {n: p.why for n, p in places.closed.items()} == {
        "expert-0": "died 3 times while starting, last: once more"
    }
    assert not places.are_due
    places.reopen("expert-0.10")
    assert due(places, now) == ["expert-0.11"]


def test_a_place_that_is_left_out_gets_a_try_from_time_to_time() -> None:
    """A host may be out of reach for a while, and its workers not at fault."""
    places = left_out("expert-0")
    assert list(places.closed) == ["expert-0"]
    assert due(places, 300.0) == ["expert-0.5"]
    assert places.closed == {}
    places.lost("expert-0.5", "cannot connect", 310.0)
    assert list(places.closed) == ["expert-0"], "one try, not three"


def test_a_place_without_which_nothing_runs_gets_its_next_try_sooner() -> None:
    places = left_out("expert-0")
    assert places.take_due(29.0, is_stalled=True) == []
    assert [m.name for m in places.take_due(30.0, is_stalled=True)] == ["expert-0.5"]
    places.lost("expert-0.5", "cannot read", 31.0)
    assert places.take_due(60.0, is_stalled=True) == []
    assert [m.name for m in places.take_due(61.0, is_stalled=True)] == ["expert-0.6"]


def test_the_next_controller_tries_again_what_is_left_out() -> None:
    places, again = left_out("expert-0"), Places(MEMBERS)
    again.restore(places.closed, {}, 1000.0)
    assert due(again, 1299.0) == []
    assert due(again, 1300.0) == ["expert-0.2"]
    again.lost("expert-0.2", "killed", 1310.0)
    assert list(again.closed) == ["expert-0"], "one try, not three"


def test_a_worker_that_died_while_starting_never_counts_as_joined() -> None:
    places = Places(MEMBERS)
    for name in ("expert-0", "expert-0.2", "expert-0.3", "expert-0.4"):
        places.lost(name, "killed", 0.0)
        places.joined([replace(MEMBERS[1], name=name)])
        places.take_due(100.0)
    assert list(places.closed) == ["expert-0"]


def test_a_place_that_was_left_on_purpose_stays_empty_until_it_is_reopened() -> None:
    places = Places(MEMBERS)
    places.cordon("expert-1")
    places.lost("expert-1", "ended", 1.0)
    assert due(places, 100.0) == []
    assert not places.are_due
    assert not places.is_full(MEMBERS[:2])
    places.reopen("expert-1")
    assert due(places, 100.0) == ["expert-1.2"]
    assert places.is_full([*MEMBERS[:2], replace(MEMBERS[2], name="expert-1.2")])


def test_of_many_workers_of_a_place_the_newest_counts() -> None:
    older = [replace(MEMBERS[1], name=name) for name in ("expert-0.10", "expert-0.2")]
    places = Places([*MEMBERS, *older])
    assert places.is_full([MEMBERS[0], MEMBERS[2], older[0]])
    places.lost("expert-0.2", "killed", 0.0)
    assert due(places, 0.0) == []
    places.lost("expert-0.10", "killed", 0.0)
    assert due(places, 0.0) == ["expert-0.11"]


def test_a_loss_counts_as_recent_for_less_than_a_minute() -> None:
    for pause, delay in ((59.9, 1.0), (60.0, 0.0)):
        places = Places(MEMBERS)
        places.lost("expert-1", "killed", 0.0)
        assert due(places, 0.0) == ["expert-1.2"]
        places.joined([replace(MEMBERS[2], name="expert-1.2")])
        places.lost("expert-1.2", "killed", pause)
        assert due(places, pause + delay - 0.1) == []
        assert due(places, pause + delay) == ["expert-1.3"]


def test_a_place_is_empty_as_soon_as_its_worker_leaves() -> None:
    places = Places(MEMBERS)
    places.cordon("expert-1")
    places.reopen("expert-1")
    assert due(places, 0.0) == ["expert-1.2"]


def test_a_reopened_place_has_all_its_tries_again() -> None:
    places = left_out("expert-0")
    assert list(places.closed) == ["expert-0"]
    places.reopen("expert-0.4")
    for name in ("expert-0.5", "expert-0.6"):
        assert due(places, 1000.0) == [name]
        places.lost(name, "killed", 0.0)
    assert places.closed == {}


def test_a_replacement_reports_its_own_addresses() -> None:
    lost = replace(MEMBERS[1], node="n0", pid=77, data_address="n0:1", kv_address="n0:2")
    places = Places([MEMBERS[0], lost, MEMBERS[2]])
    places.lost("expert-0", "killed", 0.0)
    assert places.take_due(0.0) == [replace(MEMBERS[1], name="expert-0.2")]


def test_a_worker_without_a_place_changes_nothing() -> None:
    places = Places(MEMBERS)
    stranger = replace(MEMBERS[1], name="expert-9")
    places.joined([stranger])
    places.lost("expert-9", "killed", 0.0)
    places.cordon("expert-9")
    places.reopen("expert-9")
    assert due(places, 1000.0) == []
    assert places.is_full(MEMBERS)


def nodes(**ids: str) -> NodeIds:
    """``nodes(a="12")``: nodes 1 and 2 are at address a."""
    return {address: frozenset(found) for address, found in ids.items()}


def cordoned(alive: NodeIds) -> Places:
    """Both expert workers have left host a, which is to leave, too."""
    places = Places(MEMBERS)
    places.nodes_alive(alive)
    for name in ("expert-0", "expert-1"):
        places.cordon(name, "a")
    return places


def test_a_node_that_goes_frees_its_places_once() -> None:
    places = cordoned(nodes(a="1", b="2"))
    assert not places.nodes_alive(nodes(a="1", b="2"))
    assert due(places, 1.0) == []
    assert places.nodes_alive(nodes(b="2"))
    assert due(places, 1.0) == ["expert-0.2", "expert-1.2"]
    assert not places.nodes_alive(nodes(b="2"))


def test_a_host_that_is_back_before_it_was_missed() -> None:
    places = cordoned(nodes(a="1"))
    assert not places.nodes_alive(nodes(a="12"))  # Ray has not noticed the end of 1 yet
    assert due(places, 1.0) == []
    assert places.nodes_alive(nodes(a="2"))
    assert due(places, 1.0) == ["expert-0.2", "expert-1.2"]


def test_who_has_never_looked_takes_the_first_node_for_the_drained_one() -> None:
    places = cordoned({})
    assert places.nodes_alive(nodes(a="1"))  # another controller must know it
    assert due(places, 1.0) == []
    places.nodes_alive(nodes(a="2"))
    assert due(places, 1.0) == ["expert-0.2", "expert-1.2"]


def test_another_controller_keeps_closed_places_and_fills_the_others() -> None:
    earlier = cordoned(nodes(a="1"))
    earlier.reopen("expert-1")
    places = Places(MEMBERS)
    places.restore(earlier.closed, {"expert-0": "drained", "expert-1": "drained"}, 5.0)
    assert due(places, 5.0) == ["expert-1.2"]
    assert places.nodes_alive(nodes(a="2"))
    assert due(places, 5.0) == ["expert-0.2"]


def test_added_workers_of_experts_have_the_device_of_their_rank() -> None:
    places = Places(MEMBERS)
    places.add(["attention-7", "expert-9"])
    found = {member.name: (member.rank, member.device) for member in places.take_due(0.0, False)}
    assert found == {"attention-7": (7, -1), "expert-9": (9, 9)}


def test_the_next_controller_gives_no_name_twice() -> None:
    """The workers that left long ago are in no record any more."""
    places = Places(MEMBERS)
    places.cordon("expert-1")
    places.add(["expert-2"])
    assert due(places, 0.0) == ["expert-2"]
    places.remove(["expert-2"])
    again = Places(MEMBERS[:2])
    again.restore(places.closed, {}, 5.0, names=places.names(), numbers=places.numbers)
    assert again.names() == places.names()
    again.reopen("expert-1")
    again.add(["expert-2"])
    assert due(again, 5.0) == ["expert-1.2", "expert-2.2"]


def test_a_place_that_is_filled_is_not_reopened() -> None:
    places = Places(MEMBERS)
    places.reopen("expert-0")
    assert due(places, 1000.0) == []


def test_a_place_goes_through_checked_states_only() -> None:
    place = next(iter(Places(MEMBERS)._places.values()))
    with pytest.raises(IllegalTransitionError, match="filled -> starting"):
        place.enter(PlaceState.STARTING)


def test_a_place_that_is_removed_is_not_new_any_more() -> None:
    places = Places(MEMBERS)
    (added,) = places.to_add("expert", 3)
    places.add([added])
    assert places.is_new(added)
    places.remove([added])
    assert not places.is_new(added)


def test_a_place_that_is_added_again_has_all_its_tries() -> None:
    places = left_out("expert-1")
    assert list(places.closed) == ["expert-1"]
    places.remove(["expert-1"])
    places.add(["expert-1"])
    for name in ("expert-1.5", "expert-1.6", "expert-1.7"):
        assert places.closed == {}
        assert due(places, 200.0) == [name]
        places.lost(name, "killed", 100.0)
    assert list(places.closed) == ["expert-1"]


def test_a_worker_that_was_in_no_generation_still_starts_for_the_next_controller() -> None:
    places = Places(MEMBERS)
    places.restore({}, {}, 0.0, members=["attention-0", "expert-0"])
    for place in ("expert-0", "expert-1"):
        for name in (place, f"{place}.2", f"{place}.3"):
            places.lost(name, "killed", 0.0)
            places.take_due(100.0)
    assert list(places.closed) == ["expert-1"], "its first death is one while starting, too"


def test_places_to_add_have_the_lowest_ranks_that_are_free() -> None:
    places = Places(make_members(1, 3))
    assert places.to_add("expert", 3) == places.to_add("expert", 2) == []
    assert places.to_add("expert", 5) == ["expert-3", "expert-4"]
    places.lost("expert-1", "killed", 0.0)
    places.remove(["expert-1"])
    assert places.to_add("expert", 4) == ["expert-1", "expert-3"]
    assert places.to_add("attention", 2) == ["attention-1"]
