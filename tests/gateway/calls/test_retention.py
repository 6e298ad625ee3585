"""Sessions, and how long their KV is kept: from each protocol's own words to the engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from cluster.config.gateway import GatewaySection
from cluster.core.errors import RequestError
from gateway.core.retention import parse_duration_s
from protos.inference_pb2_grpc import InferenceStub
from tests.gateway.fakes import saying, tiny_tokenizer
from tests.gateway.grpc.test_grpc import request_of
from tests.gateway.http.test_thinking import TEMPLATE
from tests.gateway.stack import MODEL, WAIT_S, Stack, post, running_stack

MESSAGES = "/v1/messages"
SESSION = "45370d6d-a23e-4786-8b91-95215e27dc99"
USER = [{"role": "user", "content": "hi"}]
EPHEMERAL: dict[str, Any] = {"type": "ephemeral"}
HOUR = {"type": "ephemeral", "ttl": "1h"}
ASKED: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "hi"},
    "/v1/chat/completions": {"messages": USER},
    "/v1/responses": {"input": "hi"},
    MESSAGES: {"messages": USER, "max_tokens": 4, "model": MODEL},
}


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """A gateway whose model calls functions."""
    with running_stack(tokenizer=tiny_tokenizer(TEMPLATE)) as stack:
        yield stack


def hint(stack: Stack, path: str, headers: dict[str, str] | None = None, **fields: Any) -> Any:
    """Session and seconds as the engine gets them."""
    stack.engine.script = saying("x")
    answer = stack.http.post(path, json={**ASKED[path], **fields}, headers=headers)
    assert answer.status_code == 200, answer.text
    request = stack.engine.requests[-1]
    return request.session, request.cache_ttl_s


@pytest.mark.parametrize("path", ASKED)
def test_the_fields_are_those_of_every_protocol(stack: Stack, path: str) -> None:
    assert hint(stack, path) == ("", None)
    assert hint(stack, path, session_id="s", cache_ttl=30) == ("s", 30.0)
    assert hint(stack, path, priority=3)[0] == ""
    assert stack.engine.requests[-1].priority == 3
    refused = post(stack, path, **ASKED[path], cache_ttl=3601)
    assert refused.status_code == 400
    assert refused.json()["error"]["message"].startswith("cache_ttl (3601.0) must be at least 0")


@pytest.mark.parametrize("path", ASKED)
def test_agents_name_their_session_in_headers(stack: Stack, path: str) -> None:
    for name in ("x-session-id", "X-Claude-Code-Session-Id", "session-id", "session_id"):
        assert hint(stack, path, {name: SESSION}) == (SESSION, None)
    both = {"x-session-id": "first", "session-id": "second"}
    assert hint(stack, path, both)[0] == "first"
    assert hint(stack, path, both, session_id="field")[0] == "field"
    for bad in ("", "a b", "x" * 257):
        answer = stack.http.post(path, json=ASKED[path], headers={"x-session-id": bad})
        assert answer.status_code == 400
        message = answer.json()["error"]["message"]
        assert message.startswith(f"x-session-id ({bad[:32]!r}) must be 1 to 256 characters")


def test_prompt_cache_key_is_before_headers(stack: Stack) -> None:
    """Codex: the key is that of a thread, of which its session has several."""
    given = {"session-id": "session"}
    for path in ("/v1/responses", "/v1/chat/completions"):
        assert hint(stack, path, given, prompt_cache_key="thread")[0] == "thread"


def test_metadata_of_grpc_names_the_session(stack: Stack) -> None:
    stack.engine.script = saying("x")
    with grpc.insecure_channel(stack.grpc_target) as channel:
        metadata = (("x-session-id", SESSION),)
        InferenceStub(channel).Generate(request_of(text="a"), timeout=WAIT_S, metadata=metadata)
    assert stack.engine.requests[-1].session == SESSION


@pytest.mark.parametrize(
    ("user_id", "session"),
    [
        (json.dumps({"device_id": "d", "account_uuid": "", "session_id": SESSION}), SESSION),
        (f"user_5439ca_account__session_{SESSION}", SESSION),
        (f"user_5439ca_account_1-2_session_{SESSION}", SESSION),
        ("someone", ""),
        ("user_5439ca_account__session_", ""),
        ("user_5439ca_account__session_a b", ""),
        (json.dumps({"session_id": 7}), ""),
        (json.dumps({"session_id": "a\nb"}), ""),
        (json.dumps([SESSION]), ""),
        ("[" * 1000, ""),
        (json.dumps({"session_id": SESSION, "more": "x" * 1024}), ""),
        ("", ""),
    ],
)
def test_the_session_in_claude_code_s_metadata(stack: Stack, user_id: str, session: str) -> None:
    given = {"metadata": {"user_id": user_id}}
    assert hint(stack, MESSAGES, **given) == (session, None)
    assert hint(stack, MESSAGES, {"x-session-id": "h"}, **given)[0] == (session or "h")
    assert hint(stack, MESSAGES, session_id="s", **given)[0] == "s"


TEXT = {"type": "text", "text": "hi"}
RESULT = [
    {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {}}]},
    {
        "role": "user",
        "content": [
            {
                "type": "tool_result",
                "tool_use_id": "t",
                "content": [{**TEXT, "cache_control": HOUR}],
            }
        ],
    },
]


@pytest.mark.parametrize(
    ("fields", "seconds"),
    [
        ({"cache_control": EPHEMERAL}, 300.0),
        ({"cache_control": {**EPHEMERAL, "ttl": "5m"}}, 300.0),
        ({"cache_control": HOUR}, 3600.0),
        ({"cache_control": None}, None),
        ({"system": [{**TEXT, "cache_control": HOUR}], "cache_control": EPHEMERAL}, 3600.0),
        ({"messages": [{"role": "user", "content": [{**TEXT, "cache_control": HOUR}]}]}, 3600.0),
        ({"messages": [*USER, *RESULT]}, 3600.0),
        (
            {"tools": [{"name": "f", "input_schema": {}, "cache_control": EPHEMERAL}]},
            300.0,
        ),
        ({"cache_control": HOUR, "cache_ttl": 7}, 7.0),
        ({"cache_control": HOUR, "cache_ttl": 0}, 0.0),
    ],
)
def test_the_longest_cache_control_is_the_ttl(
    stack: Stack, fields: dict[str, Any], seconds: float | None
) -> None:
    assert hint(stack, MESSAGES, **fields)[1] == seconds


@pytest.mark.parametrize(
    ("control", "message"),
    [
        ({"type": "ephemeral", "ttl": "2h"}, "cache_control.ttl ('2h') must be one of 5m, 1h"),
        ({"type": "forever"}, "cache_control.type must be"),
        ({"ttl": "1h"}, "cache_control.type is required"),
    ],
)
def test_other_cache_controls_are_refused(
    stack: Stack, control: dict[str, Any], message: str
) -> None:
    places: dict[str, dict[str, Any]] = {
        "": {"cache_control": control},
        "system[0].": {"system": [{**TEXT, "cache_control": control}]},
        "tools[0].": {"tools": [{"name": "f", "input_schema": {}, "cache_control": control}]},
        "messages[0].content[0].": {
            "messages": [{"role": "user", "content": [{**TEXT, "cache_control": control}]}]
        },
    }
    for place, fields in places.items():
        answer = post(stack, MESSAGES, **{**ASKED[MESSAGES], **fields})
        assert answer.status_code == 400
        assert answer.json()["error"]["message"].startswith(f"{place}{message}")


@pytest.mark.parametrize("path", [path for path in ASKED if path != MESSAGES])
def test_openai_s_words_for_it(stack: Stack, path: str) -> None:
    assert hint(stack, path, prompt_cache_options={"mode": "implicit", "ttl": "30m"})[1] == 1800.0
    assert hint(stack, path, prompt_cache_retention="24h")[1] == 3600.0
    assert hint(stack, path, prompt_cache_retention="in_memory")[1] is None
    both: dict[str, Any] = {
        "prompt_cache_retention": "24h",
        "prompt_cache_options": {"ttl": "30m"},
    }
    assert hint(stack, path, **both)[1] == 1800.0
    assert hint(stack, path, **both, cache_ttl=5)[1] == 5.0
    wrong = {"ttl": "soon"}
    answer = post(stack, path, **ASKED[path], prompt_cache_options=wrong)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "prompt_cache_options.ttl"


def test_hints_are_lowered_to_the_limit() -> None:
    with running_stack(GatewaySection(max_cache_ttl_s=60.0)) as stack:
        assert hint(stack, MESSAGES, cache_control=HOUR)[1] == 60.0
        assert hint(stack, "/v1/responses", prompt_cache_retention="24h")[1] == 60.0
        refused = post(stack, MESSAGES, **ASKED[MESSAGES], cache_ttl=61)
        assert refused.status_code == 400


def test_durations() -> None:
    given = ("90s", "5m", "1h", "2d")
    assert [parse_duration_s(one, "x") for one in given] == [90.0, 300.0, 3600.0, 172_800.0]
    for wrong in ("", "m", "05m", "5", "5 m", "-5m", "1.5h", "1234567s", "5w", "5m\n"):
        with pytest.raises(RequestError, match=r"x \(.*\) must be a whole number with"):
            parse_duration_s(wrong, "x")
