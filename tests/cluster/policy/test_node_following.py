"""How many workers there shall be, as labelled nodes come and go; by a clock moved by hand."""

from __future__ import annotations

import dataclasses

import pytest

from cluster.config.resources import NodeResources, WorkerShare
from cluster.core.node_labels import NodeLabels
from cluster.core.topology import Role
from cluster.policy.node_following import (
    LOST_S,
    MAX_RETRY_S,
    MAX_SETTLE_S,
    RETRY_S,
    SETTLE_S,
    FollowDecision,
    FollowedNode,
    NodeFollowingPolicy,
    followed_nodes,
)
from cluster.policy.places import place_of

SHARE = WorkerShare(cpus=1.0, gpus=0.0, device="cpu")


class Seen:
    """A cluster of one attention and two expert workers, each on a node of its own."""

    def __init__(self) -> None:
        self.policy = NodeFollowingPolicy()
        self.now = 100.0
        self.nodes: dict[str, FollowedNode] = {}
        self.places: dict[str, Role] = {}
        self.known: frozenset[str] = frozenset()
        self.register("a", "attention-0")
        self.register("b", "expert-0")
        self.register("c", "expert-1")
        self.known = frozenset(self.nodes)

    def register(self, node: str, *workers: str, role: Role = "expert", room: int = 1) -> None:
        """A node, with workers whose places are new."""
        roles: dict[str, Role] = {w: "attention" if "att" in w else "expert" for w in workers}
        self.nodes[node] = FollowedNode(
            node_id=node,
            address=f"10.0.0.{node}",
            role=next(iter(roles.values()), role),
            room=room,
            workers=workers,
        )
        self.places |= {place_of(w): role for w, role in roles.items()}

    def lose(self, node: str) -> None:
        """A node is gone, and its workers; their places wait."""
        del self.nodes[node]

    def leave(self, node: str) -> None:
        """Ray drains a node."""
        self.nodes[node] = dataclasses.replace(self.nodes[node], leaves=True)

    def wait(self, seconds: float, most_experts: int = 0) -> FollowDecision | None:
        """The last decision of this time; nodes that need no order are accounted for."""
        found = None
        for _ in range(round(seconds / 0.5)):
            self.now += 0.5
            found = self.policy.decide(
                list(self.nodes.values()), self.places, self.known, self.now, most_experts
            )
            if found is not None and not found.wanted:
                self.known |= found.nodes
        return found


def wanted(found: FollowDecision | None) -> dict[Role, int]:
    assert found is not None
    return found.wanted


def test_a_node_that_registers_gets_workers_once_it_is_settled() -> None:
    seen = Seen()
    seen.register("d")
    assert seen.wait(SETTLE_S - 1) is None
    found = seen.wait(2)
    assert wanted(found) == {"expert": 3}
    assert found is not None
    assert (found.reason, set(found.nodes)) == ("node 10.0.0.d registered", {"d"})


def test_nodes_that_register_together_make_one_order_for_both_roles() -> None:
    seen = Seen()
    seen.register("d")
    assert seen.wait(SETTLE_S - 1) is None
    seen.register("e", role="attention")
    seen.register("f", room=4)
    assert seen.wait(SETTLE_S - 1) is None
    assert wanted(seen.wait(2)) == {"attention": 2, "expert": 7}


def test_nodes_that_never_stop_registering_are_used_in_the_end() -> None:
    seen = Seen()
    for number in range(round(MAX_SETTLE_S / 5) + 1):
        seen.register(f"d{number}")
        found = seen.wait(5)
    assert len(found.nodes if found else ()) == round(MAX_SETTLE_S / 5) + 1


def test_a_node_that_flaps_changes_nothing() -> None:
    seen = Seen()
    for number in range(10):
        seen.register(f"d{number}")
        assert seen.wait(SETTLE_S - 2) is None
        seen.lose(f"d{number}")
        assert seen.wait(1) is None


def test_a_node_in_place_of_a_lost_one_is_filled_by_the_worker_that_waits() -> None:
    seen = Seen()
    seen.lose("c")
    assert seen.wait(60) is None
    seen.register("c2")
    seen.wait(SETTLE_S + 1)
    assert "c2" in seen.known
    seen.register("c2", "expert-1.2")
    assert seen.wait(2 * LOST_S) is None


def test_one_of_two_new_nodes_takes_the_place_of_a_lost_one() -> None:
    seen = Seen()
    seen.lose("c")
    seen.register("c2")
    seen.register("d")
    assert wanted(seen.wait(SETTLE_S + 1)) == {"expert": 3}


def test_a_worker_that_starts_again_on_its_own_node_takes_no_new_one() -> None:
    seen = Seen()
    seen.register("c")  # its worker has died
    seen.register("d")
    assert wanted(seen.wait(SETTLE_S + 1)) == {"expert": 3}


def test_a_place_whose_node_was_lost_goes_after_a_while() -> None:
    seen = Seen()
    seen.lose("c")
    assert seen.wait(LOST_S) is None
    found = seen.wait(1)
    assert wanted(found) == {"expert": 1}
    assert found is not None
    assert found.reason == "no node is left for 1 expert worker"


def test_the_last_place_of_a_role_stays() -> None:
    seen = Seen()
    for node in "abc":
        seen.lose(node)
    assert wanted(seen.wait(LOST_S + 1)) == {"expert": 1}
    del seen.places["expert-1"]
    assert seen.wait(LOST_S) is None


def test_a_worker_that_is_lost_on_a_leaving_node_is_not_waited_for() -> None:
    seen = Seen()
    seen.leave("c")
    assert seen.wait(60) is None  # it is being drained
    seen.lose("c")
    assert seen.wait(SETTLE_S - 1) is None
    assert wanted(seen.wait(2)) == {"expert": 1}


def test_a_new_node_does_not_take_the_place_of_a_worker_that_is_being_drained() -> None:
    seen = Seen()
    seen.leave("c")
    seen.register("d")
    assert wanted(seen.wait(SETTLE_S + 1)) == {"expert": 3}  # and 2 without expert-1


def test_room_that_an_order_has_left_free_stays_free() -> None:
    seen = Seen()
    seen.register("c")
    del seen.places["expert-1"]
    assert seen.wait(LOST_S) is None
    seen.register("d")
    assert wanted(seen.wait(SETTLE_S + 1)) == {"expert": 2}


def test_a_node_without_room_is_named_once() -> None:
    seen = Seen()
    seen.register("d", room=0)
    assert seen.wait(SETTLE_S) is None
    found = seen.wait(0.5)
    assert found == FollowDecision(wanted={}, nodes=frozenset({"d"}), too_small=("10.0.0.d",))
    assert seen.wait(10) is None


def test_there_are_never_more_workers_than_experts() -> None:
    seen = Seen()
    seen.register("d", room=8)
    assert wanted(seen.wait(SETTLE_S + 1, most_experts=4)) == {"expert": 4}


def test_after_a_failure_it_waits_longer_and_longer() -> None:
    seen = Seen()
    seen.register("d")
    assert wanted(seen.wait(SETTLE_S + 1))
    for pause in (RETRY_S, 2 * RETRY_S, 4 * RETRY_S, 8 * RETRY_S, MAX_RETRY_S, MAX_RETRY_S):
        seen.policy.failed(seen.now)
        assert seen.wait(pause - 1) is None
        assert wanted(seen.wait(1))
    seen.policy.succeeded()
    seen.policy.failed(seen.now)
    assert wanted(seen.wait(RETRY_S))


@pytest.mark.parametrize(
    ("share", "room"),
    [
        (SHARE, 8),
        (dataclasses.replace(SHARE, cpus=3.0), 2),
        (dataclasses.replace(SHARE, cpus=9.0), 0),
        (WorkerShare(cpus=1.0, gpus=0.5, device="cuda"), 4),
        (WorkerShare(cpus=0.0, gpus=0.0, device="cpu"), 1),
    ],
)
def test_as_many_workers_fit_as_their_share_says(share: WorkerShare, room: int) -> None:
    nodes = [
        NodeResources(node_id=role, address=role, cpus=8.0, gpus=2.0, labels=NodeLabels(role=role))
        for role in ("", "gateway", "attention", "expert")
    ]
    homes = {"expert-1": "expert", "expert-0": "expert", "attention-0": "elsewhere"}
    found = followed_nodes(nodes, share, ("attention", "expert"), homes, {"attention"})
    assert [(n.role, n.room, n.workers, n.leaves) for n in found] == [
        ("attention", room, (), True),
        ("expert", room, ("expert-0", "expert-1"), False),
    ]


def test_workers_on_nodes_of_another_role_do_not_wait() -> None:
    """Ray chose so, for example after a restart of the controller."""
    seen = Seen()
    for node, worker in (("a", "expert-0"), ("b", "attention-0")):
        seen.nodes[node] = dataclasses.replace(seen.nodes[node], workers=(worker,))
    assert seen.wait(LOST_S + 1) is None
