"""The option ``--model`` of commands that concern the workers of one of several models."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import pytest

from cluster.actors import controller_client, ray_tools
from cluster.cli.cluster.top import parse_series
from cluster.cli.main import main
from cluster.cli.terminal import admin_client
from cluster.cli.terminal.exit_codes import ExitCode
from cluster.core.codec import to_plain
from cluster.core.errors import NotReadyError
from cluster.core.fleets import CONTROLLER_NAME
from cluster.core.model_table import ModelTable, Revision, RevisionState, ServedModelEntry
from cluster.launch import models_actor
from tests.cluster.cli.cluster.test_scale import done
from tests.cluster.cli.fake_gateway import STATUS, FakeGateway
from tests.cluster.cli.models.test_talk import exposition

pytestmark = pytest.mark.usefixtures("state_home")

NAME = "large model/2"
QUERY = "model=large%20model%2F2"


@pytest.mark.parametrize(
    ("words", "paths"),
    [
        (["status"], [f"/cluster/v1/status?{QUERY}", "/ready"]),
        (["workers"], [f"/cluster/v1/status?{QUERY}"]),
        (["events"], [f"/cluster/v1/events?{QUERY}"]),
        (["placement"], [f"/cluster/v1/placement?{QUERY}"]),
        (["load"], [f"/cluster/v1/load?{QUERY}"]),
    ],
)
def test_pages_of_the_cluster_are_asked_for_the_model(
    gateway: FakeGateway, words: list[str], paths: list[str]
) -> None:
    assert main(["--url", gateway.url, *words, "--model", NAME]) == ExitCode.OK
    for path in paths:
        assert path in gateway.paths
    assert not [path for path in gateway.paths if path.startswith("/cluster") and "?" not in path]


def test_without_the_option_no_model_is_named(gateway: FakeGateway) -> None:
    assert main(["--url", gateway.url, "status"]) == ExitCode.OK
    assert not [path for path in gateway.paths if "model" in path]


def test_orders_name_the_model(gateway: FakeGateway) -> None:
    gateway.open_admin()
    gateway.admin = [(200, done())]
    words = ["--url", gateway.url, "scale", "--expert", "3", "--model", NAME]
    assert main(words) == ExitCode.OK
    assert gateway.paths == [f"/cluster/v1/status?{QUERY}", f"/admin/v1/scale?{QUERY}"]
    assert "model" not in gateway.bodies[0]


def test_a_query_gets_the_model_too(gateway: FakeGateway) -> None:
    gateway.open_admin()
    gateway.admin = [(200, {"number": 1, "lines": ["one"]})]
    assert main(["--url", gateway.url, "logs", "expert-0", "--model", NAME]) == ExitCode.OK
    assert gateway.admin_paths == [f"/admin/v1/log?process=expert-0&after=0&{QUERY}"]


def test_a_call_names_its_model_in_the_body_only(gateway: FakeGateway) -> None:
    gateway.documents = {
        "/tokenize": {"count": 0, "max_model_len": 9, "tokens": [], "token_strs": []}
    }
    words = ["--url", gateway.url, "tokenize", "hello", "--model", NAME]
    assert main(words) == ExitCode.OK
    assert gateway.paths == ["/tokenize"]
    assert gateway.bodies[0]["model"] == NAME


def test_the_status_lists_the_models(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [
        {"name": "small", "revision": "1", "state": "SERVING", "num_workers": 3},
        {"name": "large", "revision": "b", "state": "RECOVERING", "num_workers": 1},
    ]
    gateway.status = (200, {**STATUS, "models": models})
    assert main(["--url", gateway.url, "status"]) == ExitCode.OK
    line = (
        "models      small revision 1: SERVING, 3 workers; large revision b: RECOVERING, 1 worker\n"
    )
    assert line in capsys.readouterr().out
    gateway.status = (200, STATUS)
    assert main(["--url", gateway.url, "status"]) == ExitCode.OK
    assert "models  " not in capsys.readouterr().out


# ---- top ----------------------------------------------------------------------------------


def labelled(text: str, model: str) -> str:
    """An exposition with the name of another model."""
    assert 'model_name="demo"' in text
    return text.replace('model_name="demo"', f'model_name="{model}"')


def test_top_sums_the_series_of_one_model() -> None:
    few, many = exposition(rows=10, busy=1), exposition(rows=30, busy=2)
    both = labelled(few, "small") + labelled(many, "large")
    assert parse_series(both, "small") == parse_series(few)
    assert parse_series(both, "large") == parse_series(many)
    key = ("iteration_tokens_total_sum", "attention-0")
    assert parse_series(both)[key] == parse_series(few)[key] + parse_series(many)[key]
    assert parse_series(both, "third") == {}


def test_top_shows_the_model_of_the_status(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    mine, other = (labelled(exposition(rows=10, busy=1), name) for name in ("demo", "other"))
    gateway.metrics = [other.replace(" 0.25", " 0.75") + mine]
    words = ["--url", gateway.url, "top", "--interval", "0.01", "--json", "--model", "demo"]
    assert main(words) == ExitCode.OK
    worker = json.loads(capsys.readouterr().out)["workers"][0]
    assert (worker["name"], worker["kv_usage"], worker["running"]) == ("attention-0", 0.25, 3)
    assert "/cluster/v1/status?model=demo" in gateway.paths
    assert "/metrics" in gateway.paths


# ---- through Ray --------------------------------------------------------------------------


class Fleets:
    """Controllers in a Ray, by namespace, with the names of their models."""

    def __init__(self) -> None:
        self.models: dict[str, str | None] = {
            "expertmesh": "small",
            "expertmesh.model-1": None,  # its start has not come far
            "expertmesh.model-2": "large",
        }
        self.asked: list[tuple[str, str]] = []
        self.table: ModelTable | None = None
        """The table of models; None without one."""
        self.cause: Exception = ValueError("there is no such actor: the cluster starts")

    def ask_models(self, method: str, limit_s: float) -> Any:
        if self.table is None:
            raise NotReadyError("there is no table yet") from self.cause
        return to_plain(self.table)

    def live_actors(self) -> list[tuple[str, str]]:
        names = (CONTROLLER_NAME, "expert-0")
        return [(space, name) for space in self.models for name in names]

    def ask(self, method: str, *arguments: Any, limit_s: float, namespace: str) -> Any:
        if method == "origin":
            model = self.models[namespace]
            named = {"model": {"served_model_name": model}}
            return {"asked": {}, "config": None if model is None else named}
        self.asked.append((method, namespace))
        return []


@pytest.fixture
def fleets(monkeypatch: pytest.MonkeyPatch) -> Fleets:
    made = Fleets()

    @contextlib.contextmanager
    def joined(address: str) -> Iterator[None]:
        yield

    monkeypatch.setattr(admin_client, "_joined", joined)
    monkeypatch.setattr(ray_tools, "live_actors", made.live_actors)
    monkeypatch.setattr(controller_client, "ask_controller", made.ask)
    monkeypatch.setattr(models_actor, "ask_models_actor", made.ask_models)
    return made


@pytest.mark.parametrize(
    ("words", "namespace"),
    [
        ((), "expertmesh"),
        (("--model", "small"), "expertmesh"),
        (("--model", "large"), "expertmesh.model-2"),
    ],
)
def test_the_controller_of_the_model_is_asked_through_ray(
    fleets: Fleets, words: tuple[str, ...], namespace: str
) -> None:
    assert main(["operations", "list", "--address", "10.0.0.1:6379", *words]) == ExitCode.OK
    assert fleets.asked == [("operations", namespace)]


@pytest.mark.parametrize(
    ("words", "namespace"),
    [
        ((), "expertmesh.model-3"),
        (("--model", "small"), "expertmesh.model-3"),
        (("--model", "large"), "expertmesh.model-2"),
    ],
)
def test_the_controller_of_the_active_revision_is_asked(
    fleets: Fleets, words: tuple[str, ...], namespace: str
) -> None:
    ended = ServedModelEntry("ended", "", [Revision("1", "model-4", {}, RevisionState.RETIRING)])
    small = ServedModelEntry("small", "2", [Revision("2", "model-3", {}, RevisionState.READY)])
    large = ServedModelEntry("large", "1", [Revision("1", "model-2", {}, RevisionState.READY)])
    fleets.table = ModelTable([ended, small, large])
    assert main(["operations", "list", "--address", "10.0.0.1:6379", *words]) == ExitCode.OK
    assert fleets.asked == [("operations", namespace)]


def test_no_other_fleet_is_asked_while_the_table_cannot_be_read(
    fleets: Fleets, capsys: pytest.CaptureFixture[str]
) -> None:
    fleets.cause = TimeoutError("the actor restarts")
    assert main(["operations", "list", "--address", "10.0.0.1:6379"]) == ExitCode.NOT_READY
    assert "there is no table yet" in capsys.readouterr().err
    assert fleets.asked == []


def test_a_model_that_the_table_lacks_is_refused(
    fleets: Fleets, capsys: pytest.CaptureFixture[str]
) -> None:
    one = ServedModelEntry("small", "2", [Revision("2", "model-3", {}, RevisionState.READY)])
    fleets.table = ModelTable([one])
    words = ["operations", "list", "--address", "10.0.0.1:6379", "--model", "large"]
    assert main(words) == ExitCode.REFUSED
    assert "the model large is not served; served: small\n" in capsys.readouterr().err


def test_a_model_that_no_fleet_serves_is_refused(
    fleets: Fleets, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["operations", "list", "--address", "10.0.0.1:6379", "--model", "third"]
    assert main(words) == ExitCode.REFUSED
    error = capsys.readouterr().err
    assert "the model third is not served; served: small" in error
    assert "large" in error
    assert fleets.asked == []
    fleets.models.clear()
    assert main(words) == ExitCode.REFUSED
    assert "served: none" in capsys.readouterr().err
