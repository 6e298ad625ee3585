"""What a launcher waits for in a Ray that it joins."""

from __future__ import annotations

import dataclasses

import pytest

from cluster.core.codec import to_plain
from cluster.core.errors import NotReadyError, StartError
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


def test_a_second_up_takes_the_revisions_that_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = plan_of_two().models
    later = [
        dataclasses.replace(
            model,
            facts=dataclasses.replace(model.facts, head_dim=64),
            config=dataclasses.replace(model.config, fleet=f"model-{place}"),
        )
        for place, model in ((2, first), (3, second))
    ]
    plain = [dict(to_plain(_only_model(model))) for model in (*later, first)]
    revisions = [
        Revision("2", "model-2", plain[0], RevisionState.READY),
        Revision("1", "", plain[2], RevisionState.RETIRING),
    ]
    models = [
        ServedModelEntry("m", "2", revisions),
        ServedModelEntry("n", "1", [Revision("1", "model-3", plain[1], RevisionState.READY)]),
    ]
    tables = iter([ModelTable(models), ModelTable(models[:1]), ModelTable()])
    monkeypatch.setattr(joining, "ask_models_actor", lambda method, limit_s: to_plain(next(tables)))
    served = joining._served_plan(plan_of_two())
    assert served is not None
    assert [model.config.fleet for model in served.models] == ["model-2", "model-3"]
    assert [model.facts.head_dim for model in served.models] == [64, 64]
    assert (served.name, served.command) == (plan_of_two().name, plan_of_two().command)
    only = joining._served_plan(plan_of_two())
    assert only is not None
    assert [model.config.fleet for model in only.models] == ["model-2"]
    assert joining._served_plan(plan_of_two()) is None


def _only_model(model: ModelPlan) -> ModelPlan:
    return ModelPlan(config=model.config, facts=model.facts, profile=model.profile)


def test_a_table_that_cannot_be_read_ends_a_second_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(method: str, limit_s: float) -> None:
        raise NotReadyError("the table of models cannot be read: away")

    monkeypatch.setattr(joining, "ask_models_actor", fail)
    with pytest.raises(StartError, match="away"):
        joining._served_plan(plan_of_two())
