"""Names of fleets in Ray."""

from __future__ import annotations

import pytest

from cluster.core.fleets import (
    NAMESPACE,
    fleet_name,
    is_group,
    is_namespace,
    namespace_of,
    workers_group,
)

SPACES = [namespace_of(fleet_name(place)) for place in (0, 1, 10)]


def test_the_first_fleet_has_the_names_of_a_cluster_with_one_model() -> None:
    assert fleet_name(0) == ""
    assert SPACES == [NAMESPACE, "expertmesh.model-1", "expertmesh.model-10"]
    assert workers_group(NAMESPACE) == "expertmesh-workers"


@pytest.mark.parametrize("name", SPACES)
def test_namespaces_of_fleets_are_recognized(name: str) -> None:
    assert is_namespace(name)


@pytest.mark.parametrize(
    "name",
    [
        *("", "serve", "myexpertmesh", "expertmesh.model-", "expertmesh.other"),
        *("expertmesh-model-1", "expertmeshXmodel-1", "expertmesh.model-1.2"),
    ],
)
def test_other_namespaces_are_not_ours(name: str) -> None:
    assert not is_namespace(name)


@pytest.mark.parametrize("place", range(len(SPACES)))
@pytest.mark.parametrize("added", ["", "-attention-1", "-model-10-workers"])
def test_a_group_belongs_to_one_fleet(place: int, added: str) -> None:
    group = f"{workers_group(SPACES[place])}{added}"
    assert is_group(group)
    assert [is_group(group, space) for space in SPACES] == [
        index == place for index in range(len(SPACES))
    ]


@pytest.mark.parametrize(
    "name", ["", "expertmesh", "expertmesh-workersx", "other-workers", "expertmesh.model-x-workers"]
)
def test_other_groups_are_not_ours(name: str) -> None:
    assert not is_group(name)
    assert not any(is_group(name, space) for space in SPACES)
