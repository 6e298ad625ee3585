"""When a launcher gives a cluster of several models up; starts and ends: test_launch_cluster."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from cluster.core.errors import NotReadyError
from cluster.core.fleets import NAMESPACE
from cluster.launch import parts as parts_module
from cluster.launch.fleet import AWAY_LIMIT_S, Fleet
from cluster.launch.parts import ClusterParts
from tests.cluster.launch.test_fleet import Clock
from tests.cluster.launch.test_launch_plan import plan_of_two


@dataclass
class WatchedFleet(Fleet):
    """A fleet whose loss the test decides."""

    loss: str | None = None

    def find_loss(self) -> str | None:
        return self.loss


def parts_with(*losses: str | None) -> ClusterParts:
    parts = ClusterParts(plan_of_two(), lambda stage, done, total: None)
    parts._fleets = [
        WatchedFleet(f"{NAMESPACE}.model-{place}", loss=loss) for place, loss in enumerate(losses)
    ]
    return parts


class ModelsTable:
    """Stands for the actor that keeps the table of models."""

    def __init__(self) -> None:
        self.active: list[str] = []
        """Fleets of active revisions that are ready."""
        self.is_loading = False
        self.error: Exception | None = ValueError("there is no such actor")

    def ask(self, method: str, limit_s: float) -> tuple[list[str], bool]:
        assert method == "active_fleets"
        if self.error is not None:
            raise NotReadyError("no table") from self.error
        return self.active, self.is_loading


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> ModelsTable:
    made = ModelsTable()
    monkeypatch.setattr(parts_module, "ask_models_actor", made.ask)
    return made


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


def test_fleets_that_serve_in_place_of_lost_ones_are_watched(table: ModelsTable) -> None:
    parts = parts_with("gone")
    table.error, table.is_loading = None, True
    assert parts.find_loss() is None, "another revision loads"
    table.is_loading = False
    assert parts.find_loss() == "gone"
    table.active = ["model-7", "model-8"]
    assert parts.find_loss() is None
    assert [fleet.namespace for fleet in parts._fleets] == [
        f"{NAMESPACE}.model-7",
        f"{NAMESPACE}.model-8",
    ]
    parts._fleets = [WatchedFleet(fleet.namespace, loss="lost") for fleet in parts._fleets]
    assert parts.find_loss() == "lost"


def test_a_revision_that_is_only_kept_does_not_serve(table: ModelsTable) -> None:
    parts = parts_with("gone", None)
    table.error, table.active = None, ["model-0"]
    assert parts.find_loss() == "gone", "the second one is not active"


def test_an_actor_that_restarts_is_awaited(
    table: ModelsTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(parts_module, "time", clock)
    parts = parts_with("gone")
    table.error = TimeoutError("away")
    assert parts.find_loss() is None
    clock.now_s += AWAY_LIMIT_S
    assert parts.find_loss() == "gone"


def test_the_active_revisions_are_watched_also_without_a_loss(
    table: ModelsTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A revision that is kept for a rollback may go on while the active one is lost."""
    clock = Clock()
    monkeypatch.setattr(parts_module, "time", clock)
    parts = parts_with(None)
    table.error, table.active = None, ["model-7"]
    assert parts.find_loss() is None
    assert [fleet.namespace for fleet in parts._fleets] == [f"{NAMESPACE}.model-0"]
    clock.now_s += 10.0
    assert parts.find_loss() is None
    assert [fleet.namespace for fleet in parts._fleets] == [f"{NAMESPACE}.model-7"]
