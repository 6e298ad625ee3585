"""Several models in one gateway replica: which one serves a call, and what a key may use."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.config.gateway import GatewaySection
from cluster.core.errors import ModelNotFoundError
from gateway.auth.auth import CALLER
from gateway.auth.key_file import plain_entries, read_key_file
from gateway.auth.key_limits import KeyUsage
from gateway.calls.served_models import ServedModels
from tests.gateway.fakes import attention_entry, other_tokenizer
from tests.gateway.stack import MODEL, OTHER_MODEL, WAIT_S, Stack, complete, post, running_stack

pytestmark = pytest.mark.heavy

KEYS = """
keys:
  - {name: all, key: for-all}
  - {name: other, key: for-other, models: [other]}
  - {name: sql, key: for-sql, models: [sql]}
  - {name: gone, key: for-gone, models: [gone]}
"""


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Two models with keys; the second one has the adapter ``sql``."""
    path = tmp_path_factory.mktemp("keys") / "keys.yaml"
    path.write_text(KEYS)
    section = GatewaySection(request_timeout_s=WAIT_S, api_key_file=str(path), admin_keys=("root",))
    with running_stack(section, more_models={OTHER_MODEL: other_tokenizer()}) as stack:
        order = {"lora_name": "sql", "lora_path": "/adapters/sql", "model": OTHER_MODEL}
        url = f"http://{stack.admin.http}/v1/load_lora_adapter"
        answer = httpx.post(url, json=order, headers=bearer("root"), timeout=WAIT_S)
        assert answer.status_code == 200, answer.text
        yield stack


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.fixture
def as_caller(tmp_path: Path) -> Callable[[str, bool], None]:
    """Sets the key of the current request to one with these models."""

    def enter(models: str, is_admin: bool = False) -> None:
        path = tmp_path / "keys.yaml"
        path.write_text(f"keys: [{{key: k, models: {models}}}]")
        (entry,) = read_key_file(str(path))
        usage = KeyUsage(entry, entry.limits, 0.0)
        usage.is_admin = is_admin
        CALLER.set(usage)

    return enter


def found(stack: Stack, name: str | None) -> str:
    return stack.gateway.serving(name).model.name


def test_a_model_is_found_by_its_name_and_the_first_is_the_default(pair: Stack) -> None:
    assert [found(pair, name) for name in (MODEL, OTHER_MODEL, None)] == [
        MODEL,
        OTHER_MODEL,
        MODEL,
    ]
    with pytest.raises(ModelNotFoundError, match=r"the model 'third' does not exist"):
        found(pair, "third")


def test_an_unknown_name_is_shown_in_part(pair: Stack) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        found(pair, "x" * 10_000)
    assert len(str(caught.value)) < 200


def test_every_gateway_of_a_replica_finds_all_models(pair: Stack) -> None:
    other = pair.others[OTHER_MODEL].gateway
    assert other.serving(None) is pair.gateway
    assert other.serving(OTHER_MODEL) is other
    assert [name for name, _ in other.shared.models.names()] == [MODEL, OTHER_MODEL]
    assert len(other.shared.models) == 2


def test_a_key_finds_only_its_models(pair: Stack, as_caller: Callable[..., None]) -> None:
    as_caller("[other]")
    assert found(pair, None) == OTHER_MODEL, "the first one that it may use"
    assert found(pair, OTHER_MODEL) == OTHER_MODEL
    with pytest.raises(ModelNotFoundError, match=f"the model '{MODEL}' does not exist"):
        found(pair, MODEL)
    assert [name for name, _ in pair.gateway.shared.models.names()] == [OTHER_MODEL]


def test_a_key_whose_models_are_not_served_has_no_default(
    pair: Stack, as_caller: Callable[..., None]
) -> None:
    as_caller("[gone]")
    with pytest.raises(ModelNotFoundError, match="no model that this key may use is served"):
        found(pair, None)
    assert pair.gateway.shared.models.names() == []


def test_an_admin_key_finds_all(pair: Stack, as_caller: Callable[..., None]) -> None:
    as_caller("[other]", is_admin=True)
    assert found(pair, MODEL) == MODEL
    assert [name for name, _ in pair.gateway.shared.models.names()] == [MODEL, OTHER_MODEL]


def test_a_key_without_models_finds_all(pair: Stack) -> None:
    (entry,) = plain_entries(["k"])
    CALLER.set(KeyUsage(entry, entry.limits, 0.0))
    assert found(pair, MODEL) == MODEL
    assert found(pair, OTHER_MODEL) == OTHER_MODEL


def test_no_model_is_not_found_among_none() -> None:
    with pytest.raises(ModelNotFoundError, match="name one"):
        ServedModels().find(None)


def ask(stack: Stack, key: str, model: str | None) -> httpx.Response:
    fields: dict[str, Any] = {"prompt": [65, 66], "max_tokens": 1}
    fields |= {} if model is None else {"model": model}
    return stack.http.post("/v1/completions", json=fields, headers=bearer(key))


@pytest.mark.parametrize(
    ("key", "model", "answers"),
    [
        ("for-all", None, MODEL),
        ("for-all", MODEL, MODEL),
        ("for-all", "sql", "sql"),
        ("for-other", None, OTHER_MODEL),
        ("for-other", OTHER_MODEL, OTHER_MODEL),
        ("for-other", "sql", "sql"),  # a model's name includes its adapters
        ("for-other", MODEL, None),
        ("for-sql", "sql", "sql"),
        ("for-sql", OTHER_MODEL, None),
        ("for-sql", None, None),
        ("for-gone", None, None),
        ("root", MODEL, MODEL),
        ("root", OTHER_MODEL, OTHER_MODEL),
    ],
)
def test_requests_use_what_their_key_allows(
    keyed: Stack, key: str, model: str | None, answers: str | None
) -> None:
    with keyed.as_new():
        answer = ask(keyed, key, model)
        asked = [bool(e.requests) for e in (keyed.engine, keyed.others[OTHER_MODEL].engine)]
    if answers is None:
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
        assert asked == [False, False]
    else:
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == answers
        assert asked == [answers == MODEL, answers != MODEL]


def test_a_model_that_a_key_may_not_use_is_answered_as_one_that_is_not_there(keyed: Stack) -> None:
    hidden, unknown = ask(keyed, "for-other", MODEL), ask(keyed, "for-other", "nope")
    shown = hidden.json()["error"]["message"].replace(MODEL, "nope")
    assert shown == unknown.json()["error"]["message"]


@pytest.mark.parametrize(
    ("key", "names"),
    [
        ("for-all", [MODEL, OTHER_MODEL, "sql"]),
        ("for-other", [OTHER_MODEL, "sql"]),
        ("for-sql", ["sql"]),
        ("for-gone", []),
        ("root", [MODEL, OTHER_MODEL, "sql"]),
    ],
)
def test_the_list_has_what_a_key_may_use(keyed: Stack, key: str, names: list[str]) -> None:
    answer = keyed.http.get("/v1/models", headers=bearer(key))
    assert [model["id"] for model in answer.json()["data"]] == names
    for name in (MODEL, OTHER_MODEL, "sql"):
        status = keyed.http.get(f"/v1/models/{name}", headers=bearer(key)).status_code
        assert status == (200 if name in names else 404)


def test_each_call_goes_to_the_engine_of_its_model(pair: Stack) -> None:
    other = pair.others[OTHER_MODEL]
    first = complete(pair, prompt="hello", max_tokens=4, model=MODEL)
    second = complete(pair, prompt="hello", max_tokens=4, model=OTHER_MODEL)
    assert (first["usage"]["prompt_tokens"], second["usage"]["prompt_tokens"]) == (1, 5)
    (request,) = pair.engine.requests
    (others_request,) = other.engine.requests
    assert request.prompt == tuple(tokenizer_of(pair, MODEL).encode("hello"))
    assert others_request.prompt == tuple(tokenizer_of(pair, OTHER_MODEL).encode("hello"))
    ids = other.engine.script(others_request, 0)
    assert second["choices"][0]["text"] == tokenizer_of(pair, OTHER_MODEL).decode(ids, True)
    assert (first["model"], second["model"]) == (MODEL, OTHER_MODEL)


def tokenizer_of(stack: Stack, name: str) -> Any:
    tokenizer = stack.gateway.serving(name).tokenizer
    assert tokenizer is not None
    return tokenizer


def test_the_queue_of_one_model_does_not_refuse_calls_of_another() -> None:
    section = GatewaySection(request_timeout_s=WAIT_S, max_queue=1, max_queue_wait_s=0.0)
    with running_stack(section, more_models={OTHER_MODEL: other_tokenizer()}) as stack:
        stack.engine.is_paused = True
        body = {"prompt": "x", "max_tokens": 2, "stream": True}
        with stack.http.stream("POST", "/v1/completions", json=body):
            stack.wait_for(lambda: bool(stack.engine.running), "the request")
            refused = post(stack, "/v1/completions", prompt="x", max_tokens=1)
            assert refused.status_code == 429, refused.text
            complete(stack, prompt="x", max_tokens=1, model=OTHER_MODEL)
            stack.engine.is_paused = False


def test_a_replica_is_ready_once_all_models_were_and_while_one_is() -> None:
    with running_stack(serving=False, more_models={OTHER_MODEL: other_tokenizer()}) as stack:
        other = stack.others[OTHER_MODEL]

        def ready() -> tuple[int, list[str]]:
            answer = stack.http.get("/ready")
            return answer.status_code, answer.json()["reasons"]

        stack.wait_for(lambda: other.gateway.cluster.snapshot is not None, "the snapshot")
        status, reasons = ready()
        assert status == 503
        assert {reason.partition(": ")[0] for reason in reasons} == {MODEL, OTHER_MODEL}
        stack.serve_one(stack.gateway, stack.engine, stack.controller)
        status, reasons = ready()
        assert status == 503, "the second one has never been ready"
        assert {reason.partition(": ")[0] for reason in reasons} == {OTHER_MODEL}
        stack.serve_one(other.gateway, other.engine, other.controller)
        assert ready() == (200, [])

        stack.call(lambda: other.controller.change(state="STOPPED", workers=[]))
        stack.wait_for(lambda: bool(other.gateway.readiness.not_ready_reasons()), "the loss")
        assert ready() == (200, [])
        complete(stack, prompt="x", max_tokens=1)
        lost = post(stack, "/v1/completions", prompt="x", max_tokens=1, model=OTHER_MODEL)
        assert lost.status_code == 503

        stack.call(lambda: stack.controller.change(state="STOPPED", workers=[]))
        stack.wait_for(lambda: bool(stack.gateway.readiness.not_ready_reasons()), "the loss")
        assert ready()[0] == 503
        workers = [attention_entry(other.engine)]
        stack.call(lambda: other.controller.change(state="SERVING", workers=workers))
        stack.wait_for(lambda: not other.gateway.readiness.not_ready_reasons(), "readiness")
        assert ready() == (200, [])


def test_a_leaving_replica_leaves_with_all_models() -> None:
    with running_stack(more_models={OTHER_MODEL: other_tokenizer()}) as stack:
        other = stack.others[OTHER_MODEL]
        other.engine.is_paused = True
        body = {"prompt": "x", "max_tokens": 2, "stream": True, "model": OTHER_MODEL}
        with stack.http.stream("POST", "/v1/completions", json=body) as stream:
            stack.wait_for(lambda: bool(other.engine.running), "the request")
            numbers: list[int] = []
            stack.call(lambda: numbers.append(stack.gateway.shut_down("refuse", 0.0)))
            assert numbers == [1]
            for model in (MODEL, OTHER_MODEL):
                refused = post(stack, "/v1/completions", prompt="x", model=model)
                assert refused.status_code == 503
            assert stack.http.get("/ready").status_code == 503
            stack.call(lambda: numbers.append(stack.gateway.shut_down("fail", 0.0)))
            assert '"code":"draining"' in stream.read().decode()


def test_calls_for_a_model_that_is_replaced_wait_within_their_limits() -> None:
    section = GatewaySection(request_timeout_s=WAIT_S, max_queue=1)
    with running_stack(section) as stack:
        route = stack.gateway.shared.models.route_of(MODEL)
        revisions = dict(route.revisions)
        stack.call(
            lambda: route.update("1", {}, standby=stack.gateway, is_held=True)  # as in its place
        )
        answers: list[httpx.Response] = []
        waiting = threading.Thread(
            target=lambda: answers.append(post(stack, "/v1/completions", prompt="x", max_tokens=1))
        )
        waiting.start()
        stack.wait_for(lambda: route.num_held == 1, "the call")
        full = post(stack, "/v1/completions", prompt="x", max_tokens=1)
        assert (full.status_code, full.headers["retry-after"]) == (429, "5")
        refusals = 'admission_rejections_total{model_name="tiny",reason="queue_full"} 1.0'
        assert refusals in stack.http.get("/metrics").text
        stack.call(lambda: route.update("1", revisions))
        waiting.join(WAIT_S)
        assert answers[0].status_code == 200, answers[0].text
        stack.call(lambda: route.update("1", {}, standby=stack.gateway, is_held=True))
        late = stack.http.post(
            "/v1/completions", json={"prompt": "x"}, headers={"x-request-timeout-ms": "1"}
        )
        assert late.status_code == 503
        assert "is being replaced by another revision" in late.text


def test_calls_that_wait_for_a_revision_end_with_the_replica() -> None:
    with running_stack() as stack:
        route = stack.gateway.shared.models.route_of(MODEL)
        stack.call(lambda: route.update("1", {}, standby=stack.gateway, is_held=True))
        answers: list[httpx.Response] = []
        waiting = threading.Thread(
            target=lambda: answers.append(post(stack, "/v1/completions", prompt="x"))
        )
        waiting.start()
        stack.wait_for(lambda: route.num_held == 1, "the call")
        stack.call(lambda: stack.gateway.shut_down("lead", 0.0))
        assert route.num_held == 1
        stack.call(lambda: stack.gateway.shut_down("refuse", 0.0))
        waiting.join(WAIT_S)
        assert answers[0].status_code == 503
        assert answers[0].json()["error"]["code"] == "draining"


def test_a_model_that_tokenizes_has_a_running_call(pair: Stack) -> None:
    models = pair.gateway.shared.models
    other = pair.others[OTHER_MODEL].gateway
    with models.using(OTHER_MODEL) as found:
        assert found is other
        assert other.num_calls == 1
    assert other.num_calls == 0
    with pytest.raises(ModelNotFoundError), models.using("third"):
        pass
