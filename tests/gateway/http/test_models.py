"""Two models in one gateway over HTTP: every endpoint uses the model that the request names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.config.gateway import GatewaySection
from tests.gateway.fakes import BACKEND, other_tokenizer, tiny_tokenizer
from tests.gateway.sse_client import by_choice, parse_events
from tests.gateway.stack import MODEL, OTHER_MODEL, WAIT_S, Stack, post, running_stack

TEXT = "hello world"
OTHER_IDS = other_tokenizer().encode(TEXT)
MESSAGES = [{"role": "user", "content": TEXT}]


def say_in_other(stack: Stack, text: str) -> None:
    """Let the second model say a text, in tokens of its own."""
    ids = list(other_tokenizer().encode(text))
    stack.others[OTHER_MODEL].engine.script = lambda request, choice: ids


def test_the_models_are_listed_with_their_own_facts(pair: Stack) -> None:
    models = pair.http.get("/v1/models").json()["data"]
    assert [(m["id"], m["root"], m["parent"]) for m in models] == [
        (MODEL, MODEL, None),
        (OTHER_MODEL, OTHER_MODEL, None),
    ]
    for model in models:
        assert pair.http.get(f"/v1/models/{model['id']}").json() == model


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/chat/completions", {"messages": MESSAGES}),
        ("/v1/responses", {"input": "x"}),
        ("/v1/messages", {"messages": MESSAGES, "max_tokens": 1}),
        ("/v1/messages/count_tokens", {"messages": MESSAGES}),
        ("/v1/embeddings", {"input": "x"}),
        ("/v1/score", {"text_1": "x", "text_2": "y"}),
        ("/classify", {"input": "x", "labels": ["a", "b"]}),
        ("/v1/inspect", {"token_ids": [1], "outputs": ["logits"]}),
        ("/tokenize", {"prompt": "x"}),
        ("/detokenize", {"tokens": [1]}),
    ],
)
def test_a_model_that_is_not_served_is_unknown(
    pair: Stack, path: str, fields: dict[str, Any]
) -> None:
    answer = post(pair, path, model="third", **fields)
    assert answer.status_code == 404, answer.text
    assert "the model 'third' does not exist" in answer.text
    assert not pair.engine.requests
    assert not pair.others[OTHER_MODEL].engine.requests


def test_chats_use_the_template_and_the_tokenizer_of_the_model(pair: Stack) -> None:
    say_in_other(pair, "of another model")
    fields = {"messages": MESSAGES, "max_tokens": 16, "model": OTHER_MODEL}
    answer = post(pair, "/v1/chat/completions", **fields).json()
    assert answer["choices"][0]["message"]["content"] == "of another model"
    assert answer["model"] == OTHER_MODEL
    with pair.http.stream("POST", "/v1/chat/completions", json={**fields, "stream": True}) as live:
        parts = by_choice(parse_events("".join(live.iter_text())))[0]
    text = "".join(part["delta"].get("content") or "" for part in parts)
    assert text == "of another model"
    (plain, streamed) = pair.others[OTHER_MODEL].engine.requests
    assert plain.prompt == streamed.prompt
    tokenizer = other_tokenizer()
    assert TEXT in tokenizer.decode(list(plain.prompt), False)
    assert not pair.engine.requests


def test_responses_and_messages_use_the_tokenizer_of_the_model(pair: Stack) -> None:
    say_in_other(pair, "of another model")
    answer = post(pair, "/v1/responses", model=OTHER_MODEL, input="x", max_output_tokens=16)
    assert answer.status_code == 200, answer.text
    (message,) = [item for item in answer.json()["output"] if item["type"] == "message"]
    assert message["content"][0]["text"] == "of another model"
    assert answer.json()["model"] == OTHER_MODEL
    answer = post(pair, "/v1/messages", model=OTHER_MODEL, messages=MESSAGES, max_tokens=16)
    assert answer.status_code == 200, answer.text
    assert answer.json()["content"][0]["text"] == "of another model"
    assert answer.json()["model"] == OTHER_MODEL
    assert not pair.engine.requests


def test_tokens_are_counted_in_those_of_the_model(pair: Stack) -> None:
    body = {"prompt": TEXT, "add_special_tokens": False}
    first = post(pair, "/tokenize", **body).json()
    second = post(pair, "/tokenize", model=OTHER_MODEL, **body).json()
    assert first["tokens"] == BACKEND.encode(TEXT).ids
    assert second["tokens"] == list(OTHER_IDS)
    assert second["count"] == len(TEXT) != first["count"]
    for model, ids in ((MODEL, first["tokens"]), (OTHER_MODEL, second["tokens"])):
        assert post(pair, "/detokenize", model=model, tokens=ids).json() == {"prompt": TEXT}
    counts = [
        post(pair, "/v1/messages/count_tokens", model=model, messages=MESSAGES).json()
        for model in (MODEL, OTHER_MODEL)
    ]
    assert counts[0]["input_tokens"] < counts[1]["input_tokens"]


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/embeddings", {"input": TEXT}),
        ("/v1/score", {"text_1": TEXT, "text_2": "x"}),
        ("/classify", {"input": TEXT, "labels": ["a", "b"]}),
    ],
)
def test_pooled_prompts_are_read_by_the_engine_of_the_model(
    pair: Stack, path: str, fields: dict[str, Any]
) -> None:
    other = pair.others[OTHER_MODEL].engine
    post(pair, path, model=OTHER_MODEL, **fields)  # the scripted engine has no vectors to return
    assert not pair.engine.requests
    assert other.requests[0].prompt[: len(OTHER_IDS)] == tuple(OTHER_IDS)


def test_a_response_of_one_model_is_continued_with_another(tmp_path: Path) -> None:
    section = GatewaySection(request_timeout_s=WAIT_S, state_dir=str(tmp_path / "state"))
    with running_stack(section, more_models={OTHER_MODEL: other_tokenizer()}) as stack:
        say_in_other(stack, "of another model")
        body = {"input": "first words", "max_output_tokens": 16}
        first = post(stack, "/v1/responses", model=OTHER_MODEL, **body)
        assert first.status_code == 200, first.text
        more = {"input": "more words", "previous_response_id": first.json()["id"]}
        second = post(stack, "/v1/responses", model=MODEL, max_output_tokens=4, **more)
        assert second.status_code == 200, second.text
        (request,) = stack.engine.requests
        prompt = tiny_tokenizer().decode(list(request.prompt), False)
        places = [prompt.index(text) for text in ("first words", "of another model", "more words")]
        assert places == sorted(places)


def test_the_status_names_all_models(pair: Stack) -> None:
    status = pair.http.get("/cluster/v1/status").json()
    assert status["models"] == [
        {"name": MODEL, "revision": "1", "state": "SERVING", "num_workers": 3},
        {"name": OTHER_MODEL, "revision": "1", "state": "SERVING", "num_workers": 3},
    ]
    assert status["model"]["name"] == MODEL
    named = pair.http.get("/cluster/v1/status", params={"model": OTHER_MODEL}).json()
    assert named["model"]["name"] == OTHER_MODEL
    assert named["models"] == status["models"]
    addresses = [
        next(w["engine_address"] for w in found["workers"] if w["name"] == "attention-0")
        for found in (status, named)
    ]
    assert addresses == [pair.engine.address, pair.others[OTHER_MODEL].engine.address]


def test_the_status_of_one_model_has_no_list(stack: Stack) -> None:
    assert "models" not in stack.http.get("/cluster/v1/status").json()


@pytest.mark.parametrize("what", ["status", "placement", "load", "events"])
def test_pages_of_the_cluster_concern_the_model_in_the_query(pair: Stack, what: str) -> None:
    first, second = (
        pair.http.get(f"/cluster/v1/{what}", params={"model": model})
        for model in (MODEL, OTHER_MODEL)
    )
    assert (first.status_code, second.status_code) == (200, 200)
    unknown = pair.http.get(f"/cluster/v1/{what}", params={"model": "third"})
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
    if what == "load":
        assert [found.json()["model"] for found in (first, second)] == [MODEL, OTHER_MODEL]


def test_the_events_are_those_of_the_model(pair: Stack) -> None:
    event = {"generation": 9, "time": 0.0, "cause": "only here", "effect": "SERVING"}
    other = pair.others[OTHER_MODEL].controller
    former = other.state["history"]
    pair.call(lambda: other.change(history=[event]))
    found = [
        pair.http.get("/cluster/v1/events", params={"model": model}).json()["events"]
        for model in (MODEL, OTHER_MODEL)
    ]
    pair.call(lambda: other.change(history=former))
    assert json.dumps(found[0]).count("only here") == 0
    assert found[1] == [event]


def test_an_abort_reaches_calls_of_all_models(pair: Stack) -> None:
    pair.others[OTHER_MODEL].engine.is_paused = True
    body = {"prompt": "x", "max_tokens": 4, "stream": True, "model": OTHER_MODEL}
    headers = {"x-request-id": "of-the-other"}
    with pair.http.stream("POST", "/v1/completions", json=body, headers=headers) as live:
        pair.wait_for(lambda: bool(pair.others[OTHER_MODEL].engine.running), "the request")
        assert pair.run(pair.gateway.status.abort_calls(["of-the-other"])) == ["of-the-other"]
        assert "request_aborted" in live.read().decode()
