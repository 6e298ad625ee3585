"""Roles, pools, and which workers exchange rows."""

from __future__ import annotations

from benchmarks.harness.members import members_of
from cluster.core.codec import from_plain, to_plain
from cluster.core.topology import Generation, Member
from tests.cluster.controller.fakes_cluster import make_members


def names(members: tuple[Member, ...]) -> list[str]:
    return [m.name for m in members]


def test_two_pools_face_each_other() -> None:
    generation = Generation(number=1, members=make_members(1, 2))
    assert names(generation.attention) == names(generation.peers_of("expert")) == ["attention-0"]
    assert names(generation.experts) == names(generation.peers_of("attention"))
    assert names(generation.experts) == ["expert-0", "expert-1"]


def test_colocated_workers_are_in_both_pools_and_face_all() -> None:
    generation = Generation(number=1, members=members_of({"colocated": 2})[::-1])
    everyone = ["colocated-0", "colocated-1"]
    assert names(generation.attention) == names(generation.experts) == everyone
    assert names(generation.peers_of("colocated")) == everyone
    assert generation.leader.name == "colocated-0"


def test_a_generation_travels_as_plain_data() -> None:
    generation = Generation(number=3, members=members_of({"colocated": 2}))
    assert from_plain(to_plain(generation), Generation) == generation
