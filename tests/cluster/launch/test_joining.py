"""What a launcher waits for in a Ray that it joins."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from cluster.core.codec import to_plain
from cluster.core.errors import ConfigError, NotReadyError, StartError
from cluster.core.fleets import NAMESPACE
from cluster.core.model_table import ModelTable, Revision, RevisionState, ServedModelEntry
from cluster.launch import joining
from cluster.launch.joining import wait_free_cpus
from cluster.launch.model_plan import ModelPlan
from tests.cluster.launch.test_launch_plan import plan_of_two


def test_cpus_of_ended_actors_are_awaited(caplog: pytest.LogCaptureFixture) -> None:
    counts = iter([1.0, 1.0, 2.5, 4.0])
    wait_free_cpus(4.0, 60.0, lambda: next(counts))
    assert list(counts) == []
    assert caplog.records == []


def test_cpus_that_others_took_are_given_up(caplog: pytest.LogCaptureFixture) -> None:
    wait_free_cpus(4.0, 0.0, lambda: 3.0)
    assert "Ray has 3 of 4 CPUs free after 0 s" in caplog.text


class Running:
    """A cluster that has started: its table of models, and its controllers."""

    def __init__(self) -> None:
        first, second = plan_of_two().models
        self.active = RevisionState.READY
        self.states = {"model-2": "SERVING", "model-3": "SERVING"}
        """States of the fleets whose controllers run."""
        self.asked: dict[str, str] = {}
        self.fleets = "model-2", "model-3"
        self.models = (first, second)
        self.ended = 0

    def ask_models(self, method: str, limit_s: float) -> Any:
        assert method == "table"
        retiring = Revision("1", "model-9", self._plan(0, "model-9"), RevisionState.RETIRING)
        entries = [
            ServedModelEntry(
                model.config.model.served_model_name,
                "2",
                [Revision("2", fleet, self._plan(place, fleet), self.active), retiring],
            )
            for place, (model, fleet) in enumerate(zip(self.models, self.fleets, strict=True))
        ]
        return to_plain(ModelTable(entries))

    def _plan(self, place: int, fleet: str) -> dict[str, Any]:
        model = self.models[place]
        config = dataclasses.replace(model.config, fleet=fleet)
        facts = dataclasses.replace(model.facts, head_dim=64)
        return dict(to_plain(ModelPlan(config=config, facts=facts, profile=model.profile)))

    def ask(self, method: str, limit_s: float, namespace: str = NAMESPACE) -> Any:
        fleet = namespace.removeprefix(NAMESPACE).removeprefix(".")
        if fleet not in self.states:
            raise NotReadyError("no cluster runs there") from ValueError()
        if self.states[fleet] == "RESTARTING":
            raise NotReadyError("it does not answer") from TimeoutError()
        return {"state": self.states[fleet], "asked": self.asked}

    def end(self) -> None:
        self.ended += 1


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> Running:
    made = Running()
    monkeypatch.setattr(joining, "ask_models_actor", made.ask_models)
    monkeypatch.setattr(joining, "ask_controller", made.ask)
    monkeypatch.setattr(joining, "_end_failed", made.end)
    return made


def test_a_second_up_takes_the_active_revisions(running: Running) -> None:
    plan = plan_of_two()
    served = joining._served_plan(plan)
    assert served is not None
    assert [model.config.fleet for model in served.models] == ["model-2", "model-3"]
    assert [model.facts.head_dim for model in served.models] == [64, 64]
    assert (served.name, served.command, served.asked) == (plan.name, plan.command, plan.asked)


def test_options_are_compared_while_the_first_revision_is_active(running: Running) -> None:
    running.fleets = "", "model-3"
    running.states[""] = "SERVING"
    running.asked = {"--dtype": "float32"}
    with pytest.raises(ConfigError, match="runs a cluster with other settings"):
        joining._served_plan(plan_of_two())
    running.states[""] = "RESTARTING"
    assert joining._served_plan(plan_of_two()) is not None


@pytest.mark.parametrize(
    ("states", "active", "serves"),
    [
        ({"model-2": "STOPPED", "model-3": "SERVING"}, RevisionState.READY, True),
        ({"model-3": "SERVING"}, RevisionState.READY, True),
        ({"model-2": "RESTARTING"}, RevisionState.READY, True),
        ({}, RevisionState.LOADING, True),
        ({"model-2": "STOPPED"}, RevisionState.READY, False),
        ({}, RevisionState.FAILED, False),
    ],
)
def test_a_cluster_that_cannot_serve_is_ended(
    running: Running, states: dict[str, str], active: RevisionState, serves: bool
) -> None:
    running.states, running.active = states, active
    assert (joining._served_plan(plan_of_two()) is not None) == serves
    assert running.ended == (not serves)


def test_a_table_that_cannot_be_read_ends_a_second_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(method: str, limit_s: float) -> None:
        raise NotReadyError("the table of models cannot be read: away")

    monkeypatch.setattr(joining, "ask_models_actor", fail)
    with pytest.raises(StartError, match="away"):
        joining._served_plan(plan_of_two())
