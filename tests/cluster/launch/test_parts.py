"""When a launcher gives a cluster of several models up; starts and ends: test_launch_cluster."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from cluster.launch.fleet import Fleet
from cluster.launch.parts import ClusterParts
from tests.cluster.launch.test_launch_plan import plan_of_two


@dataclass
class WatchedFleet(Fleet):
    """A fleet whose loss the test decides."""

    loss: str | None = None

    def find_loss(self) -> str | None:
        return self.loss


def parts_with(*losses: str | None) -> ClusterParts:
    plan = plan_of_two()
    parts = ClusterParts(plan, lambda stage, done, total: None)
    parts._fleets = [WatchedFleet(plan.models[1], loss=loss) for loss in losses]
    return parts


@pytest.mark.parametrize(
    ("losses", "found"),
    [
        ((None,), None),
        (("gone",), "gone"),
        ((None, None), None),
        (("gone", None), None),
        ((None, "gone"), None),
        (("first", "second"), "first"),
        ((), None),
    ],
)
def test_a_cluster_is_lost_when_all_its_models_are(
    losses: tuple[str | None, ...], found: str | None
) -> None:
    assert parts_with(*losses).find_loss() == found
