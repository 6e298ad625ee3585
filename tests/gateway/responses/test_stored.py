"""Responses that are stored, continued, read again and removed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.config.gateway import GatewaySection
from gateway.core.errors import StorageError, StorageFullError
from gateway.responses import stored
from gateway.state.store import StateStore
from tests.gateway.fakes import EOS, saying, tiny_tokenizer
from tests.gateway.responses.streams import PATH, parse, respond, stream, text_of, without_names
from tests.gateway.responses.test_input import CALL, OUTPUT, THOUGHT, USER
from tests.gateway.stack import WAIT_S, Stack, post, running_stack

ABSENT = "resp_" + "0" * 32


def section(folder: Path, **more: Any) -> GatewaySection:
    return GatewaySection(state_dir=str(folder), request_timeout_s=WAIT_S, **more)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state") / "state"


@pytest.fixture(scope="module")
def shared_storing(folder: Path) -> Iterator[Stack]:
    with running_stack(section(folder)) as stack:
        yield stack


@pytest.fixture
def storing(shared_storing: Stack) -> Iterator[Stack]:
    """A gateway with a state folder, whose model says ``hello``."""
    with shared_storing.as_new():
        shared_storing.engine.script = saying("hello")
        yield shared_storing


def prompt_of(stack: Stack) -> str:
    """What the model read last."""
    return tiny_tokenizer().decode(stack.engine.requests[-1].prompt, False)


def get(stack: Stack, path: str, status: int = 200, **query: Any) -> Any:
    answer = stack.http.get(f"{PATH}/{path}", params=query)
    assert answer.status_code == status, answer.text
    return answer.json()


@pytest.mark.parametrize(
    "ask", [respond, lambda stack, **body: stream(stack, **body)[-1]["response"]]
)
def test_a_stored_response_is_what_was_answered(storing: Stack, ask: Any) -> None:
    found = ask(storing, input="hi")
    assert found["store"] is True
    assert get(storing, found["id"]) == found
    answer = storing.http.delete(f"{PATH}/{found['id']}")
    assert answer.json() == {"id": found["id"], "object": "response", "deleted": True}
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items")):
        gone = storing.http.request(method, f"{PATH}/{found['id']}{path}")
        assert gone.status_code == 404
        assert gone.json()["error"]["code"] == "not_found"


def test_nothing_is_stored_unasked(storing: Stack, folder: Path) -> None:
    before = sorted(folder.rglob("resp_*"))
    found = respond(storing, input="hi", store=False)
    assert found["store"] is False
    assert get(storing, found["id"], 404)["error"]["type"] == "invalid_request_error"
    assert sorted(folder.rglob("resp_*")) == before


def test_a_conversation_goes_on(storing: Stack) -> None:
    first = respond(storing, input="one", instructions="be brief")
    second = respond(storing, input="two", previous_response_id=first["id"])
    assert second["previous_response_id"] == first["id"]
    assert second["instructions"] is None
    storing.http.delete(f"{PATH}/{first['id']}")  # those after it do not need it
    third = stream(
        storing, input="three", previous_response_id=second["id"], instructions="be long"
    )[-1]["response"]
    assert (
        prompt_of(storing)
        == "".join(
            f"<|{role}|>{text}{EOS}\n"
            for role, text in [
                ("system", "be long"),
                ("user", "one"),
                ("assistant", "hello"),
                ("user", "two"),
                ("assistant", "hello"),
                ("user", "three"),
            ]
        )
        + "<|assistant|>"
    )
    items = get(storing, f"{third['id']}/input_items", order="asc")["data"]
    assert [text_of(item) for item in items] == ["one", "hello", "two", "hello", "three"]


def test_a_response_that_was_cut_can_be_continued(storing: Stack) -> None:
    cut = respond(storing, input="one", max_output_tokens=1)
    assert cut["status"] == "incomplete"
    assert get(storing, cut["id"]) == cut
    respond(storing, previous_response_id=cut["id"])
    assert prompt_of(storing).endswith(f"<|assistant|>hello{EOS}\n<|assistant|>")


def test_the_previous_response_must_be_there(storing: Stack) -> None:
    for wrong in (ABSENT, "resp_1", "", "../state", "x" * 500):
        answer = post(storing, PATH, input="x", previous_response_id=wrong)
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["param"] == "previous_response_id"
        assert error["code"] == "previous_response_not_found"
    assert not storing.engine.requests


MAX_BODY = GatewaySection().max_body_bytes


def test_references_count_as_often_as_they_are_made(
    storing: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They take few bytes of the body, and all bytes of the item in the prompt."""
    item = stored_item(storing, "a" * 500)
    raw = len(json.dumps(item, separators=(",", ":")))
    count = MAX_BODY // raw + 1
    read: list[int] = []
    monkeypatch.setattr(stored, "read_items", lambda items: read.append(len(list(items))))
    answer = post(storing, PATH, input=[{"type": "item_reference", "id": item["id"]}] * count)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    rule = f"refers to {count * raw} bytes of stored items, at most {MAX_BODY} are allowed"
    assert (error["param"], error["message"]) == ("input", f"input {rule}")
    assert (read, storing.engine.requests) == ([], [])


def stored_item(stack: Stack, text: str) -> dict[str, Any]:
    """An item of a response that is stored."""
    first = respond(stack, input=text)
    (item,) = get(stack, f"{first['id']}/input_items")["data"]
    stack.engine.requests.clear()
    found: dict[str, Any] = item
    return found


def test_a_long_conversation_is_not_read(storing: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    first = respond(storing, input="a" * 500)
    storing.engine.requests.clear()
    monkeypatch.setattr(
        storing.gateway, "limits", replace(storing.gateway.limits, max_body_bytes=500)
    )
    answer = post(storing, PATH, input="x", previous_response_id=first["id"])
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "previous_response_id")
    assert "bytes of stored items, at most 500 are allowed" in error["message"]
    assert not storing.engine.requests


def test_a_conversation_and_references_share_a_limit(
    storing: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = respond(storing, input="a" * 100)
    item = stored_item(storing, "b" * 500)
    limits = replace(storing.gateway.limits, max_body_bytes=1200)
    monkeypatch.setattr(storing.gateway, "limits", limits)
    reference = {"type": "item_reference", "id": item["id"]}
    respond(storing, input=[reference])
    answer = post(storing, PATH, input=[reference], previous_response_id=first["id"])
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input")


def test_items_are_found_by_their_ids(storing: Stack) -> None:
    first = respond(storing, input="one")
    (asked,) = get(storing, f"{first['id']}/input_items")["data"]
    (answered,) = first["output"]
    references = [
        {"type": "item_reference", "id": asked["id"]},
        {"id": answered["id"]},
        {"role": "user", "content": "two"},
    ]
    second = respond(storing, input=references)
    assert prompt_of(storing).startswith(f"<|user|>one{EOS}\n<|assistant|>hello{EOS}\n<|user|>two")
    items = get(storing, f"{second['id']}/input_items", order="asc")["data"]
    assert [item["id"] for item in items[:2]] == [asked["id"], answered["id"]]
    for wrong in ("msg_" + "0" * 38, "msg_mine", answered["id"][:-1] + "9"):
        answer = post(storing, PATH, input=[{"type": "item_reference", "id": wrong}])
        assert answer.json()["error"]["param"] == "input[0].id"
    many = [{"type": "item_reference", "id": f"msg_{number:032x}000001"} for number in range(257)]
    assert post(storing, PATH, input=many).json()["error"]["param"] == "input"


def test_input_items_come_in_pages(storing: Stack) -> None:
    sent = [{"role": "user", "content": str(number)} for number in range(25)]
    path = f"{respond(storing, input=sent)['id']}/input_items"
    first = get(storing, path)
    assert [text_of(item) for item in first["data"]] == [str(n) for n in range(24, 4, -1)]
    assert (first["has_more"], first["last_id"]) == (True, first["data"][-1]["id"])
    rest = get(storing, path, after=first["last_id"])
    assert [text_of(item) for item in rest["data"]] == [str(n) for n in range(4, -1, -1)]
    assert (rest["has_more"], rest["first_id"]) == (False, rest["data"][0]["id"])
    assert get(storing, path, after=rest["last_id"]) == {
        "object": "list",
        "data": [],
        "first_id": None,
        "last_id": None,
        "has_more": False,
    }
    forward = get(storing, path, order="asc", limit=2)
    assert [text_of(item) for item in forward["data"]] == ["0", "1"]
    for query in (
        {"limit": "0"},
        {"limit": "101"},
        {"limit": "x"},
        {"order": "up"},
        {"after": "x"},
    ):
        error = get(storing, path, 400, **query)["error"]
        assert error["param"] == next(iter(query))


def test_items_of_all_kinds_are_kept(storing: Stack) -> None:
    template = "{% for m in messages %}{{ m.role }}{% endfor %}{% if tools %}{% endif %}<tool_call>"
    with running_stack(storing.config.gateway, tiny_tokenizer(template)) as other:
        sent = [USER, THOUGHT, CALL, OUTPUT]
        found = respond(other, input=sent, max_output_tokens=1)
        items = get(other, f"{found['id']}/input_items", order="asc")["data"]
        assert [item["type"] for item in items] == [
            "message",
            "reasoning",
            "function_call",
            "function_call_output",
        ]
        assert (items[2]["arguments"], items[3]["output"]) == (CALL["arguments"], "noon")
        respond(other, input="next", previous_response_id=found["id"], max_output_tokens=1)


def test_only_the_background_can_be_cancelled(storing: Stack) -> None:
    found = respond(storing, input="x")
    answer = storing.http.post(f"{PATH}/{found['id']}/cancel")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "response_id"
    assert "background" in answer.json()["error"]["message"]


def test_a_stored_response_is_not_streamed_again(storing: Stack) -> None:
    found = respond(storing, input="x")
    assert get(storing, found["id"], 400, stream="true")["error"]["param"] == "stream"
    assert get(storing, found["id"], stream="false") == found


# ---- several gateways, several keys ---------------------------------------------------------


def test_gateways_share_the_folder(storing: Stack) -> None:
    found = respond(storing, input="one")
    with running_stack(storing.config.gateway) as other:
        assert get(other, found["id"]) == found
        respond(other, input="two", previous_response_id=found["id"], max_output_tokens=1)
        assert "one" in prompt_of(other)
        other.http.delete(f"{PATH}/{found['id']}")
    get(storing, found["id"], 404)


def test_a_key_sees_its_own_responses_only(tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text(
        "keys:\n  - {name: a, key: key-a}\n  - {name: b, key: key-b}\n  - {key: key-c}\n"
    )
    with running_stack(section(tmp_path / "state", api_key_file=str(keys))) as stack:
        stack.engine.script = saying("hello")

        def client(key: str) -> httpx.Client:
            headers = {"authorization": f"Bearer {key}"}
            return httpx.Client(base_url=stack.url, headers=headers, timeout=WAIT_S)

        with client("key-a") as owner, client("key-b") as other, client("key-c") as unnamed:
            found = owner.post(PATH, json={"input": "secret"}).json()
            item = found["output"][0]["id"]
            own = f"{PATH}/{found['id']}"
            for stranger in (other, unnamed):
                for method, path in (
                    ("GET", own),
                    ("DELETE", own),
                    ("POST", f"{own}/cancel"),
                    ("GET", f"{own}/input_items"),
                ):
                    assert stranger.request(method, path).status_code == 404
                for body in (
                    {"input": "x", "previous_response_id": found["id"]},
                    {"input": [{"type": "item_reference", "id": item}]},
                ):
                    assert stranger.post(PATH, json=body).status_code == 400
            assert owner.get(own).json() == found
        with httpx.Client(base_url=stack.url) as nobody:
            assert nobody.get(own).status_code == 401
        assert len(stack.engine.requests) == 1


# ---- bounds and failures --------------------------------------------------------------------


def test_responses_expire(tmp_path: Path) -> None:
    with running_stack(section(tmp_path / "state")) as stack:
        stack.engine.script = saying("hello")
        found = respond(stack, input="x")
        now_s = 0.0
        store = stack.gateway.state
        assert store is not None
        store._clock = lambda: found["created_at"] + 30 * 24 * 3600.0 + now_s
        get(stack, found["id"])
        now_s = 60.0
        get(stack, found["id"], 404)
        answer = post(stack, PATH, input="x", previous_response_id=found["id"])
        assert answer.json()["error"]["code"] == "previous_response_not_found"
        assert store.sweep() == 0, "by the clock of the disk it has not expired"


def test_the_oldest_responses_make_room(tmp_path: Path) -> None:
    with running_stack(section(tmp_path / "state", state_max_objects=2)) as stack:
        stack.engine.script = saying("hello")
        first, second, third = (respond(stack, input=str(number))["id"] for number in range(3))
        get(stack, first, 404)
        get(stack, second)
        get(stack, third)


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (StorageFullError("no room"), 429, "storage_full"),
        (StorageError("no disk"), 500, "storage_failed"),
    ],
)
def test_what_cannot_be_stored(
    storing: Stack, monkeypatch: pytest.MonkeyPatch, error: StorageError, status: int, code: str
) -> None:
    """Who asks for it gets an error; for others the answer is not stored, and says so."""

    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr(StateStore, "put", fail)
    answer = post(storing, PATH, input="x", store=True)
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == code
    assert answer.headers["x-should-retry"] == "false"
    events = parse(post(storing, PATH, input="x", store=True, stream=True).text)
    assert [event["type"] for event in events[-2:]] == ["error", "response.failed"]
    assert (events[-2]["code"], events[-1]["response"]["store"]) == (code, False)
    for found in (respond(storing, input="x"), stream(storing, input="x")[-1]["response"]):
        assert (found["store"], found["status"]) == (False, "completed")
        get(storing, found["id"], 404)


def test_a_damaged_response_is_an_error(storing: Stack, folder: Path) -> None:
    found = respond(storing, input="x")
    (file,) = folder.rglob(found["id"])
    raw = file.read_bytes()
    file.write_bytes(raw[:-1])
    assert get(storing, found["id"], 500)["error"]["code"] == "storage_failed"
    answer = post(storing, PATH, input="x", previous_response_id=found["id"])
    assert answer.status_code == 500
    assert not storing.engine.requests[1:]


def test_answers_are_the_same_stored_or_not(storing: Stack) -> None:
    stored = respond(storing, input="x")
    plain = respond(storing, input="x", store=False)
    assert without_names({**stored, "store": None}) == without_names({**plain, "store": None})


def test_ids_of_responses_that_are_not_stored(stack: Stack) -> None:
    first, second = (respond(stack, input="x", max_output_tokens=1)["id"] for _ in range(2))
    assert first != second
    assert len(first) == len(ABSENT)
    get(stack, first, 404)
    for method, path in (("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items")):
        assert stack.http.request(method, f"{PATH}/{first}{path}").status_code == 404
