"""Large bodies and messages are read and checked away from the event loop."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any, NoReturn

import grpc
import pytest
from google.protobuf import json_format

from cluster.config.gateway import GatewaySection
from gateway.calls import inspect, request_submitter
from gateway.core.bodies import StrictBody
from gateway.engines import request_router
from gateway.grpc import api, pooling
from gateway.http import api as http_api
from gateway.http import json_output, sse
from gateway.http import pooling as http_pooling
from gateway.http.json_output import dump_long
from gateway.http.schema import ChatStreamOptionsBody
from gateway.offload.json_text import MAX_VALUES
from gateway.offload.long_work import INLINE_SIZE
from protos import inference_pb2 as pb
from tests.gateway.stack import MODEL, WAIT_S, Stack, post, running_stack
from workers.requests.block_hash import block_hashes
from workers.requests.request import Request

pytestmark = pytest.mark.heavy

PAD = {"user": "a" * INLINE_SIZE}
BODIES: Mapping[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "a", "max_tokens": 1},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
    "/v1/responses": {"input": "a", "max_output_tokens": 16},
    "/v1/messages": {
        "model": MODEL,
        "messages": [{"role": "user", "content": "a"}],
        "max_tokens": 1,
    },
    "/v1/messages/count_tokens": {
        "model": MODEL,
        "messages": [{"role": "user", "content": "a"}],
    },
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [1]},
    "/v1/embeddings": {"input": "a"},
    "/classify": {"input": "a", "labels": ["b"]},
    "/score": {"text_1": "a", "text_2": "b"},
    "/v1/inspect": {"token_ids": [1], "outputs": ["logits"]},
    "/v1/batches": {
        "input_file_id": "file_1",
        "endpoint": "/v1/completions",
        "completion_window": "24h",
    },
}


@pytest.fixture(scope="module")
def keeper(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    state = tmp_path_factory.mktemp("state") / "state"
    with running_stack(GatewaySection(request_timeout_s=WAIT_S, state_dir=str(state))) as stack:
        yield stack


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the threads that check bodies."""
    found: list[str] = []
    check = StrictBody.model_validate.__func__  # type: ignore[attr-defined]

    def note(kind: type[StrictBody], data: Any) -> Any:
        found.append(threading.current_thread().name)
        return check(kind, data)

    monkeypatch.setattr(StrictBody, "model_validate", classmethod(note))
    return found


@pytest.mark.parametrize("path", BODIES)
def test_only_large_bodies_are_checked_in_a_thread(
    keeper: Stack, threads: list[str], path: str
) -> None:
    if path == "/v1/inspect":  # the engine has no arrays: refused after the check
        BODIES[path]["outputs"] = ["none"]
    small, large = (post(keeper, path, **BODIES[path], **more) for more in ({}, PAD))
    assert small.status_code == large.status_code
    here, there = threads
    assert not here.startswith("long-work")
    assert there.startswith("long-work")


PROMPTS: Mapping[str, tuple[str, str]] = {
    "/v1/embeddings": ("input", "prompt_list"),
    "/classify": ("input", "prompt_list"),
    "/score": ("text_2", "prompt_list"),
    "/v1/inspect": ("token_ids", "mask_list"),
}
"""By path, the field with prompts, and the function that takes them."""


@pytest.mark.parametrize("path", PROMPTS)
def test_many_prompts_are_taken_in_a_thread(
    keeper: Stack, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    field, name = PROMPTS[path]
    take, found = getattr(http_pooling, name), []

    def note(prompts: Any) -> Any:
        found.append(threading.current_thread().name)
        return take(prompts)

    monkeypatch.setattr(http_pooling, name, note)
    answer = post(keeper, path, **{**BODIES[path], field: [[1, 2, 3]] * INLINE_SIZE})
    assert answer.status_code == 400
    assert found
    assert all(thread.startswith("long-work") for thread in found)


def test_many_labels_are_checked_in_a_thread(
    keeper: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    check, found = inspect._sized_prompts, []

    def note(*values: Any) -> Any:
        found.append(threading.current_thread().name)
        return check(*values)

    monkeypatch.setattr(inspect, "_sized_prompts", note)
    fields = {"token_ids": [1], "outputs": ["loss"], "labels": [[1] * 2 * INLINE_SIZE]}
    answer = post(keeper, "/v1/inspect", **fields)
    assert answer.status_code == 400, answer.text
    assert "labels has" in answer.json()["error"]["message"]
    (where,) = found
    assert where.startswith("long-work")


@pytest.mark.parametrize("path", BODIES)
def test_too_many_values_are_refused_by_every_endpoint(keeper: Stack, path: str) -> None:
    """Also in a field that is ignored, and before the body is parsed."""
    body = json.dumps({**BODIES[path], "x": [[]] * MAX_VALUES})
    headers = {"content-type": "application/json"}
    answer = keeper.http.post(path, content=body, headers=headers)
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert "body has" in message
    assert f"strings, lists and objects, at most {MAX_VALUES} are allowed" in message


MESSAGES: Mapping[str, tuple[Any, dict[str, Any], Any, str]] = {
    "Generate": (
        pb.GenerateRequest,
        {"text": "a", "sampling_params": {"max_tokens": 1, "stop_token_ids": [1] * 20_000}},
        api,
        "grpc_call",
    ),
    "Detokenize": (pb.DetokenizeRequest, {"tokens": [1] * 20_000}, api, "copy_numbers"),
    "Inspect": (
        pb.InspectRequest,
        {"token_ids": [{"ids": [1] * 20_000}], "outputs": ["none"]},
        pooling,
        "grpc_inspect_fields",
    ),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_large_messages_are_converted_in_a_thread(
    keeper: Stack, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    kind, fields, module, function = MESSAGES[name]
    found: list[str] = []
    convert = getattr(module, function)

    def note(*values: Any) -> Any:
        found.append(threading.current_thread().name)
        return convert(*values)

    monkeypatch.setattr(module, function, note)
    message = json_format.ParseDict(fields, kind())
    with grpc.insecure_channel(keeper.grpc_target) as channel:
        make = channel.unary_stream if name == "Inspect" else channel.unary_unary
        call = make(f"/expertmesh.v1.Inference/{name}", kind.SerializeToString, bytes)
        try:
            answer = call(message, timeout=WAIT_S)
            if name == "Inspect":
                list(answer)
        except grpc.RpcError as err:
            assert err.code() is grpc.StatusCode.INVALID_ARGUMENT  # noqa: PT017
    (where,) = found
    assert where.startswith("long-work")


def test_prompts_are_hashed_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of KV blocks, by which requests are routed, of all prompts of a call."""
    found: list[str] = []
    hashes = block_hashes

    def note(request: Request, *details: Any) -> list[bytes]:
        found.append(threading.current_thread().name)
        return hashes(request, *details)

    def refuse(*_: object) -> NoReturn:
        raise AssertionError("hashed on the event loop")

    monkeypatch.setattr(request_submitter, "block_hashes", note)
    monkeypatch.setattr(request_router, "block_hashes", refuse)
    with running_stack(serving=False) as stack:
        stack.engine.kv_block_size = 16
        stack.serve()
        prompts = [[1] * 100] * 200
        answer = post(stack, "/v1/completions", prompt=prompts, max_tokens=1)
        assert answer.status_code == 200, answer.text
    assert len(found) == 200
    assert all(name.startswith("long-work") for name in found)


def test_long_answers_are_written_in_a_thread(
    keeper: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []
    write = dump_long

    def note(content: object) -> bytes:
        found.append(threading.current_thread().name)
        return write(content)

    monkeypatch.setattr(http_api, "dump_long", note)
    prompts = [[1] * 100] * 10
    fields = {"prompt": prompts, "max_tokens": 1, "echo": True}
    answer = post(keeper, "/v1/completions", **fields)
    assert answer.status_code == 200, answer.text
    (name,) = found
    assert name.startswith("long-work")


def test_pieces_of_an_answer_are_freed_as_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[bytes] = []
    held: list[int] = []
    freed = 3  # references: the list's, the variable's and the argument's

    def pieces(content: object) -> Iterator[bytes]:
        for number in range(5000):
            if number % 500 == 0:
                held.append(sum(sys.getrefcount(piece) > freed for piece in made))
            made.append(b"%d," % number)
            yield made[-1]

    monkeypatch.setattr(json_output, "_json_pieces", pieces)
    assert dump_long(None) == b"".join(made)
    assert max(held) <= 1024


def test_a_long_event_is_written_in_short_pieces(
    keeper: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a streamed answer with ``echo`` and alternatives for each token of the prompt."""
    tops = [{f"t{k}": -k / 3 for k in range(20)} for _ in range(5000)]
    chunk: dict[str, Any] = {"choices": [{"logprobs": {"top_logprobs": tops}}]}
    expected, write = json_output.dump_json(chunk), json_output.dump_json
    sizes: list[int] = []

    def note(content: object) -> bytes:
        sizes.append(len(write(content)))
        return write(content)

    monkeypatch.setattr(json_output, "dump_json", note)
    monkeypatch.setattr(sse, "dump_json", note)
    formatter: Any = SimpleNamespace(text_chunk=lambda delta: None, chunks=lambda delta: [chunk])
    none: Any = None
    stream = sse.SseStream(
        gateway=keeper.gateway,
        responder=none,
        request_id="a",
        formatter=formatter,
        options=ChatStreamOptionsBody(),
    )
    delta: Any = SimpleNamespace(size=INLINE_SIZE + 1)
    assert stream._events(none, [delta]) == b"data: %b\n\n" % expected
    assert max(sizes) < 32_768


def test_an_answer_is_written_in_short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the first entry of a list, which has no alternatives, is null."""
    tops = [None, *({f"t{k}": -k / 3 for k in range(20)} for _ in range(5000))]
    answer: dict[str, Any] = {
        "choices": [{"top": tops, "ids": (*range(10_000),)}] * 2,
        "e": {},
        "l": [],
        "n": None,
    }
    expected, write = json_output.dump_json(answer), json_output.dump_json
    sizes: list[int] = []

    def note(content: object) -> bytes:
        raw = write(content)
        sizes.append(len(raw))
        return raw

    monkeypatch.setattr(json_output, "dump_json", note)
    assert dump_long(answer) == expected
    assert max(sizes) < 32_768
