"""The tree of a generation: who sends headers to whom, and whose proposals go up together."""

from __future__ import annotations

import pytest

from cluster.core.topology import Generation, Member, Role, StepGroup
from workers.engine.step_tree import MAX_DIRECT, StepTree


def generation_of(num_attention: int, num_experts: int, role: Role = "attention") -> Generation:
    members = [
        Member(name=f"{role}-{r}", role=role, rank=2 * r) for r in reversed(range(num_attention))
    ]
    members += [Member(name=f"expert-{r}", role="expert", rank=r) for r in range(num_experts)]
    return Generation(number=1, members=tuple(members))


def trees_of(generation: Generation) -> dict[str, StepTree]:
    return {m.name: StepTree.of(generation, m.name) for m in generation.members}


def test_each_step_group_has_a_tree_with_all_expert_workers() -> None:
    groups: list[StepGroup] = ["prefill", "decode", "prefill", "decode"]
    members = [
        Member(name=f"attention-{r}", role="attention", rank=r, group=group)
        for r, group in enumerate(groups)
    ]
    members += [Member(name=f"expert-{r}", role="expert", rank=r) for r in range(2)]
    generation = Generation(number=1, members=tuple(members))
    assert [[m.rank for m in own] for own in generation.groups] == [[1, 3], [0, 2]]
    pairs = (("attention-1", "attention-3"), ("attention-0", "attention-2"))
    for group, (leader, other) in enumerate(pairs):
        tree = StepTree.of(generation, leader)
        assert (tree.leader, tree.parent) == (leader, "")
        assert tree.children == (other, "expert-0", "expert-1")
        assert StepTree.of(generation, other).parent == leader
        for expert in ("expert-0", "expert-1"):
            assert StepTree.of(generation, expert, group).parent == leader
    assert StepTree.of(generation, "expert-0", 2).parent == ""


@pytest.mark.parametrize(
    "sizes",
    [(1, 0), (1, 8), (2, 7), (9, 0), (1, 40), (2, 62), (5, 5), (32, 32), (64, 64), (3, 125)],
)
def test_every_worker_is_reached_once_and_every_rank_proposes_once(sizes: tuple[int, int]) -> None:
    generation = generation_of(*sizes)
    trees = trees_of(generation)
    assert {tree.leader for tree in trees.values()} == {"attention-0"}
    assert trees["attention-0"].depth == 0
    reached, ranks, queue = ["attention-0"], [0], ["attention-0"]
    assert not trees["attention-0"].parent
    while queue:
        tree = trees[(name := queue.pop())]
        for child in tree.children:
            assert trees[child].parent == name
            assert trees[child].depth == tree.depth + 1
            assert (child in tree.inner) == bool(trees[child].children)
            if child.startswith("attention"):
                own = tree.ranks_below[child]
                below = [rank for ranks in trees[child].ranks_below.values() for rank in ranks]
                assert own == {2 * int(child.removeprefix("attention-")), *below}
                ranks += own if name == "attention-0" else []
            assert not trees[child].children or child.startswith("attention")
        reached += tree.children
        queue += tree.children
    assert sorted(reached) == sorted(trees)
    assert sorted(ranks) == [m.rank for m in generation.attention]


def test_a_small_cluster_has_no_second_hop() -> None:
    for num_attention in (1, 4, 9):
        generation = generation_of(num_attention, MAX_DIRECT + 1 - num_attention)
        tree = StepTree.of(generation, "attention-0")
        assert len(tree.children) == MAX_DIRECT
        assert not tree.inner


@pytest.mark.parametrize(("sizes", "most"), [((64, 64), 15), ((32, 32), 10), ((64, 0), 10)])
def test_no_worker_sends_to_more_than_the_square_root(sizes: tuple[int, int], most: int) -> None:
    trees = trees_of(generation_of(*sizes))
    assert max(len(tree.children) for tree in trees.values()) == most
    assert len(trees["attention-0"].children) < most


def test_a_few_attention_ranks_share_many_expert_workers() -> None:
    trees = trees_of(generation_of(3, 61))
    counts = [len(trees[f"attention-{r}"].children) for r in range(3)]
    assert counts == [2 + 21, 20, 20]


def test_colocated_workers_are_all_attention_ranks() -> None:
    tree = StepTree.of(generation_of(16, 0, "colocated"), "colocated-0")
    assert len(tree.children) == len(tree.inner) == 3
    assert tree.ranks_below["colocated-1"] == {2, 8, 14, 20, 26}


def test_a_worker_outside_every_generation_has_no_place() -> None:
    assert StepTree.of(Generation(number=0, members=()), "attention-0") == StepTree(
        "", "", (), frozenset(), {}
    )
