"""Bodies at the limits of size, in every shape, to every endpoint: how long the event loop stops.

``python -m tests.long.fuzz --limits`` serves the bundled model, sends each body once, and sends
small requests over gRPC meanwhile, which the same event loop answers. A stop is the longest answer
to one of them, without the longest time that a thread of the gateway waited for a processor, and at
most the gateway's processor time: other processes of a busy machine do not count, and a thread that
holds the interpreter lock does. What other machines take of the processor counts too, so a body
that stops the loop for too long is sent again, and its shortest stop counts.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import grpc

from benchmarks.harness.server import Served, running_server
from benchmarks.report.results import table
from protos import inference_pb2 as pb

BODY_BYTES = 8 * 1024 * 1024
MESSAGE_BYTES = 16 * 1024 * 1024
MAX_STOP_S = 0.05
"""Longest time that the event loop may stop."""
_NUM_TRIES = 4
"""Times that a body which stops the loop for too long is sent."""
_PAUSE_S = 0.05
"""Before and behind each body, so that a stop belongs to it."""
ENDPOINTS: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "/v1/completions": ({"max_tokens": 1}, "prompt"),
    "/v1/chat/completions": ({"max_tokens": 1}, "messages"),
    "/v1/responses": ({"max_output_tokens": 16}, "input"),
    "/v1/messages": ({"model": "expertmesh-demo", "max_tokens": 1}, "messages"),
    "/v1/messages/count_tokens": ({"model": "expertmesh-demo"}, "messages"),
    "/tokenize": ({}, "prompt"),
    "/detokenize": ({}, "tokens"),
    "/v1/embeddings": ({}, "input"),
    "/classify": ({"labels": ["a"]}, "input"),
    "/score": ({"text_1": "a"}, "text_2"),
    "/v1/inspect": ({"outputs": ["logits"]}, "token_ids"),
    "/v1/batches": ({"endpoint": "/v1/completions", "completion_window": "24h"}, "input_file_id"),
}
"""By path, further fields of a body, and the field that has its input."""


TEMPLATE = """{% if tools %}<tool_call>{{ tools | tojson }}{% endif %}
{%- for m in messages %}<|{{ m.role }}|>{{ m.content }}
{%- for c in m.tool_calls or () %}{{ c.function.arguments | tojson }}{% endfor %}
{% endfor %}"""
"""A chat template that shows tools and calls, which the bundled model's does not."""


@dataclass(frozen=True, slots=True)
class Case:
    """One request."""

    path: str
    shape: str
    body: bytes
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Stop:
    """How long the event loop stopped for a case."""

    case: Case
    stop_s: float
    answer: str
    """Status, or code of gRPC."""
    took_s: float


def _list(item: str, num_bytes: int, count: int = 2**30) -> str:
    number = max(1, min(count, num_bytes // (len(item.encode()) + 1)))
    return f"[{item}{f',{item}' * (number - 1)}]"


def _names(count: int, width: int) -> str:
    return "{" + ",".join(f'"{place:0{width}x}":0' for place in range(count)) + "}"


def values(num_bytes: int) -> dict[str, str]:
    """JSON values of about a size by the name of their shape.

    Shapes named ``within`` hold as much as one text may hold.
    """
    return {
        "[] fill the body": _list("[]", num_bytes),
        "{} fill the body": _list("{}", num_bytes),
        '"" fill the body': _list('""', num_bytes),
        "1 fills the body": _list("1", num_bytes),
        "names fill the body": _names(num_bytes // 12, 6),
        "one name in all entries": "{" + ('"a":1,' * (num_bytes // 6))[:-1] + "}",
        "[] within": _list("[]", num_bytes, 130_000),
        "strings within": _list('"abc"', num_bytes, 130_000),
        "objects within": _list('{"a":""}', num_bytes, 32_000),
        "token ids within": _list("512", num_bytes, 1_000_000),
        "lists of token ids within": _list("[1,2,3]", num_bytes, 130_000),
        "floats within": _list("0.12345", num_bytes, 1_000_000),
        "floats of 21 digits within": _list("123456789012345678901e-320", num_bytes),
        "integers of 4,299 digits": _list("1" * 4299, num_bytes),
        "a number of 8 million digits": "1" * num_bytes,
        "names within": _names(64_000, 60),
        "nested 60 deep": _list("[" * 60 + "]" * 60, num_bytes, 2_000),
        "nested without end": "[" * num_bytes,
        "one string": json.dumps("a" * num_bytes),
        "one string of words": json.dumps("so it is, " * (num_bytes // 10)),
        "escapes": '"' + "\\n" * (num_bytes // 2) + '"',
        "escapes of UTF-16": '"' + "\\ud83d\\ude00" * (num_bytes // 12) + '"',
        "characters of 3 bytes": '"' + "\u8a9e" * (num_bytes // 3) + '"',
        "white space": "[" + " " * num_bytes + "]",
        "JSON in a string": json.dumps(_list("{}", num_bytes)),
    }


def _with(fields: Mapping[str, Any], name: str, value: str) -> bytes:
    """A body with a field whose JSON is ``value``."""
    head = json.dumps(dict(fields))[1:-1]
    return f'{{{head}{", " if head else ""}"{name}": {value}}}'.encode()


def _message(role: str, text: str) -> str:
    return json.dumps({"role": role, "content": text})


def _tools(count: int, schema: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {"type": "function", "function": {"name": f"f{place}", "parameters": schema}}
        for place in range(count)
    ]


def own_cases() -> Iterator[tuple[str, str, bytes]]:
    """Bodies in the shapes that single endpoints have: path, shape and body."""
    room = BODY_BYTES - 1000
    chat, user = "/v1/chat/completions", _message("user", "a")
    many = {
        "16,384 messages": _list(user, room, 16_384),
        "system messages fill the body": _list(_message("system", "a" * 430), room, 16_384),
        "developer messages between": _list(f"{user},{_message('system', 'b' * 400)}", room, 8_000),
        "a message of 26,000 parts": _list(
            '{"role":"user","content":' + _list('{"type":"text","text":"a"}', room, 26_000) + "}", 1
        ),
        "a long message": _list(_message("user", "so it is, " * (room // 10)), 1),
        "extra fields": _list('{"role":"user","content":"","x":' + _names(60_000, 8) + "}", 1),
    }
    call = '{"id":"a","function":{"name":"f","arguments":%s}}'
    for path in (chat, "/v1/responses", "/v1/messages", "/v1/messages/count_tokens", "/tokenize"):
        fields = ENDPOINTS[path][0]
        for shape, value in many.items():
            yield path, shape, _with(fields, "input" if "responses" in path else "messages", value)
    arguments = {
        "calls with JSON of {}": json.dumps('{"a":' + _list("{}", room // 2) + "}"),
        "calls with JSON of a string": json.dumps(json.dumps({"a": "b" * (room // 2)})),
    }
    for shape, text in arguments.items():
        said = f'[{user},{{"role":"assistant","tool_calls":[{call % text}]}},{user}]'
        yield chat, shape, _with({"max_tokens": 1}, "messages", said)
    chatting = {"max_tokens": 1, "messages": [{"role": "user", "content": "a"}]}
    enum = {"type": "object", "properties": {"a": {"enum": [f"{i:06}" for i in range(900)]}}}
    wide = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(250)}}
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(14):
        deep = {"type": "object", "properties": {"a": deep}}
    for name, schema in {"enums": enum, "properties": wide, "levels": deep}.items():
        for count, choice in ((128, "auto"), (128, "required"), (5, "auto"), (5, "required")):
            fields = {**chatting, "tools": _tools(count, schema), "tool_choice": choice}
            yield chat, f"{count} tools of many {name}, {choice}", json.dumps(fields).encode()
    completing = {"prompt": "a", "max_tokens": 1}
    for name, value in {
        "logit_bias": "{" + ",".join(f'"{place}":1' for place in range(1000)) + "}",
        "stop": _list('"a"', room, 130_000),
        "stop_token_ids": _list("1", room, 1_000_000),
        "allowed_token_ids": _list("1", room, 1_000_000),
        "bad_words": _list('"ab"', 10**6, 1024),
        "chat_template_kwargs": _names(64_000, 60),
    }.items():
        yield "/v1/completions", name, _with(completing, name, value)
        yield chat, name, _with(chatting, name, value)
    full = [[1] * 4000] * 256  # computed once: the others find it in the cache
    yield (
        "/v1/completions",
        "256 long prompts",
        json.dumps({"prompt": full, "max_tokens": 1}).encode(),
    )
    echo = {"prompt": full[:45], "max_tokens": 1, "echo": True}
    yield "/v1/completions", "echo of 45 prompts", json.dumps(echo).encode()
    echo = {"prompt": full[:4], "max_tokens": 0, "echo": True, "logprobs": 20}
    yield "/v1/completions", "echo of 4 prompts with logprobs", json.dumps(echo).encode()
    echo = {**echo, "max_tokens": 1, "stream": True}
    yield "/v1/completions", "streamed echo with logprobs", json.dumps(echo).encode()
    ranked = {"prompt": full[:4], "max_tokens": 1, "prompt_logprobs": 20}
    yield "/v1/completions", "log-probabilities of 4 prompts", json.dumps(ranked).encode()
    yield "/v1/embeddings", "256 long prompts", json.dumps({"input": full}).encode()
    masked = {"input": full, "attention_mask": full, "labels": ["a"]}
    yield "/classify", "256 masked prompts", json.dumps(masked).encode()
    scored = {"text_1": [1] * 200, "text_2": [[2] * 20] * 256}
    yield "/score", "256 documents", json.dumps(scored).encode()
    inspected = {"token_ids": [[1] * 1000], "outputs": ["hidden_states", "logits", "routes"]}
    yield "/v1/inspect", "long answer", json.dumps(inspected).encode()
    seen = {"prompt": "so it is, " * (room // 10), "return_token_strs": True}
    yield "/tokenize", "names of all tokens", json.dumps(seen).encode()
    cut = {"prompt": "so it is, " * (room // 10), "max_tokens": 1, "truncate_prompt_tokens": 9}
    yield "/v1/completions", "a long prompt, cut", json.dumps(cut).encode()


def cases(quick: bool) -> Iterator[Case]:
    """All HTTP bodies; with ``quick`` the shapes of single endpoints only."""
    headers = {"content-type": "application/json"}
    made = {} if quick else values(BODY_BYTES - 1000)
    for path, (fields, name) in ENDPOINTS.items():
        good = {**fields, name: "a"}
        for shape, value in made.items():
            yield Case(path, f"{shape} in {name}", _with(fields, name, value), headers)
            yield Case(path, f"{shape} in an unknown field", _with(good, "x", value), headers)
    for path, shape, body in own_cases():
        yield Case(path, shape, body, headers)
    edge = b"--b\r\ncontent-disposition: form-data; name=%s\r\n\r\n"
    begin = edge % b'"purpose"' + b"batch\r\n" + edge % b'"file"; filename="a"'
    for shape, content in {
        "lines": b'{"a":1}\n' * 2_000_000,
        "line ends": b"\r\n" * 8_000_000,
        "beginnings of the boundary": b"\r\n--" * 4_000_000,
        "parts": (b"\r\n" + edge % b'"x"') * 100_000,
    }.items():
        kind = {"content-type": "multipart/form-data; boundary=b"}
        yield Case("/v1/files", shape, begin + content + b"\r\n--b--\r\n", kind)


def _field(number: int, content: bytes) -> bytes:
    """A field of protobuf that has a length."""
    length, head = len(content), bytearray([number << 3 | 2])
    while length > 127:
        head.append(length & 127 | 128)
        length >>= 7
    return bytes(head) + bytes([length]) + content


def grpc_cases() -> Iterator[Case]:
    """Messages of gRPC: ``path`` is the procedure."""
    room = MESSAGE_BYTES - 1000
    user = _field(1, _field(1, b"user") + _field(2, b"a"))
    empty_input = _field(2, b"")
    wide = "\U0001f600".encode() * (room // 4)
    ids = _field(1, b"\x01" * room)
    for name, shape, data in (
        ("Generate", "token ids fill the message", _field(3, ids)),
        ("Generate", "token ids within", _field(3, _field(1, b"\x01" * 1_000_000))),
        ("Generate", "empty messages fill the message", _field(4, b"\x0a\x00" * (room // 2))),
        ("Generate", "40,000 messages", _field(4, user * 40_000)),
        ("Generate", "16,384 messages", _field(4, user * 16_384)),
        ("Generate", "stops fill the message", _field(6, b"\x6a\x00" * (room // 2))),
        ("Generate", "unknown fields fill the message", b"\xa0\x06\x01" * (room // 3)),
        ("Generate", "groups fill the message", b"\xa3\x06\xa4\x06" * (room // 4)),
        ("Generate", "one text", _field(2, b"so it is, " * (room // 10))),
        ("Tokenize", "one text", _field(2, b"so it is, " * (room // 10))),
        ("Tokenize", "characters of 4 bytes", _field(2, wide)),
        ("Tokenize", "a model of characters of 4 bytes", _field(1, wide)),
        ("Classify", "a label of characters of 4 bytes", _field(3, wide)),
        ("Embed", "an id of characters of 4 bytes", _field(5, wide)),
        ("Detokenize", "tokens within", _field(2, b"\x01" * 1_000_000)),
        ("Embed", "empty inputs fill the message", empty_input * (room // 2)),
        ("Embed", "256 long prompts", _field(2, _field(2, _field(1, b"\x01" * 4000))) * 256),
        ("Classify", "labels fill the message", b"\x1a\x00" * (room // 2)),
        ("Score", "empty documents fill the message", b"\x1a\x00" * (room // 2)),
        ("Inspect", "token ids within", _field(2, _field(1, b"\x01" * 1_000_000))),
    ):
        yield Case(name, shape, data, {})


class Prober:
    """Sends small requests to the event loop of a gateway, one after the other."""

    def __init__(self, target: str, pid: int) -> None:
        channel = grpc.insecure_channel(target, [("grpc.use_local_subchannel_pool", 1)])
        self._channel = channel
        self._call = channel.unary_unary("/expertmesh.v1.Inference/GetModelInfo", bytes, bytes)
        self._tasks = Path(f"/proc/{pid}/task")
        self._ends = threading.Event()
        self._longest_s = 0.0
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def take(self) -> float:
        """The longest stop since the last call, seconds."""
        found, self._longest_s = self._longest_s, 0.0
        return found

    def close(self) -> None:
        self._ends.set()
        self._thread.join()
        self._channel.close()

    def _run(self) -> None:
        message = pb.GetModelInfoRequest().SerializeToString()
        while not self._ends.wait(0.002):
            before, began_s = self._times(), time.monotonic()
            self._call(message, timeout=300.0)
            took_s = time.monotonic() - began_s
            if took_s > self._longest_s:
                after, none = self._times(), (0.0, 0.0)
                pairs = [(end, before.get(name, none)) for name, end in after.items()]
                spent = [(end[0] - start[0], end[1] - start[1]) for end, start in pairs]
                busy_s = sum(ran_s for ran_s, _ in spent)
                queued_s = max((waited_s for _, waited_s in spent), default=0.0)
                self._longest_s = max(self._longest_s, min(took_s - queued_s, busy_s))

    def _times(self) -> dict[str, tuple[float, float]]:
        """By thread of the gateway, how long it ran, and waited for a processor, seconds."""
        found = {}
        for task in self._tasks.iterdir():
            with contextlib.suppress(OSError):
                ran, waited, _ = (task / "schedstat").read_text().split()
                found[task.name] = int(ran) / 1e9, int(waited) / 1e9
        return found


def _post(server: Served, case: Case) -> str:
    connection = http.client.HTTPConnection(*server.http_address, timeout=300.0)
    with contextlib.closing(connection):
        try:
            connection.request("POST", case.path, case.body, dict(case.headers))
            answer = connection.getresponse()
            answer.read()
        except OSError as err:
            return type(err).__name__
    return str(answer.status)


def _call(channel: grpc.Channel, case: Case) -> str:
    path = f"/expertmesh.v1.Inference/{case.path}"
    try:
        if case.path == "Inspect":
            for _ in channel.unary_stream(path, bytes, bytes)(case.body, timeout=300.0):
                pass
        else:
            channel.unary_unary(path, bytes, bytes)(case.body, timeout=300.0)
    except grpc.RpcError as err:
        return str(err.code().name)
    return "OK"


def measure(quick: bool, log: Callable[[str], object] = lambda line: None) -> list[Stop]:
    """Send all bodies to a server of its own."""
    found: list[Stop] = []
    with tempfile.TemporaryDirectory(prefix="fuzz", dir="/tmp") as folder:
        template = Path(folder) / "template.jinja"
        template.write_text(TEMPLATE)
        words = ["--state-dir", str(Path(folder) / "state"), "--chat-template", str(template)]
        with running_server(Path(folder), *words) as server:
            pid = int(server.status()["gateway"][0]["pid"])
            prober = Prober(server.grpc, pid)
            options = [
                ("grpc.max_send_message_length", -1),
                ("grpc.max_receive_message_length", -1),
            ]
            try:
                with grpc.insecure_channel(server.grpc, options) as channel:
                    every = chain(cases(quick), grpc_cases(), stored_cases(server))
                    for case in every:
                        stop = _send(server, channel, prober, case)
                        log(_line(stop))
                        case = replace(case, body=b"")  # all bodies would be gigabytes
                        found.append(replace(stop, case=case))
            finally:
                prober.close()
    return found


def _send(server: Served, channel: grpc.Channel, prober: Prober, case: Case) -> Stop:
    """The shortest stop of a case."""
    stops: list[Stop] = []
    while len(stops) < _NUM_TRIES and all(stop.stop_s > MAX_STOP_S for stop in stops):
        time.sleep(_PAUSE_S)
        prober.take()
        began_s = time.monotonic()
        is_http = case.path.startswith("/")
        answer = _post(server, case) if is_http else _call(channel, case)
        took_s = time.monotonic() - began_s
        time.sleep(_PAUSE_S)
        stops.append(Stop(case, prober.take(), answer, took_s))
    return min(stops, key=lambda stop: stop.stop_s)


def stored_cases(server: Served) -> Iterator[Case]:
    """Bodies of Responses that refer to stored items."""
    made = server.client.post(
        "/v1/responses", json={"input": "a" * 2000, "store": True, "max_output_tokens": 16}
    ).json()
    path = f"/v1/responses/{made['id']}/input_items"
    (item,) = server.client.get(path).json()["data"]
    headers = {"content-type": "application/json"}
    reference = json.dumps({"type": "item_reference", "id": item["id"]})
    for count in (500, 16_384):
        body = _with({"max_output_tokens": 16}, "input", _list(reference, BODY_BYTES, count))
        yield Case("/v1/responses", f"{count} references to one item", body, headers)


def _line(stop: Stop) -> str:
    mark = " ****" if stop.stop_s > MAX_STOP_S else ""
    return (
        f"{1000 * stop.stop_s:7.1f} ms {stop.took_s:6.1f} s {stop.answer:>8} {stop.case.path} "
        f"{stop.case.shape} ({len(stop.case.body)} bytes){mark}\n"
    )


def report(stops: list[Stop]) -> str:
    """The longest stop at each endpoint, and all above the bound."""
    worst: dict[str, Stop] = {}
    counts: dict[str, int] = {}
    for stop in stops:
        path = stop.case.path
        counts[path] = counts.get(path, 0) + 1
        if path not in worst or stop.stop_s > worst[path].stop_s:
            worst[path] = stop
    rows = [
        (path, str(counts[path]), f"{1000 * one.stop_s:.0f} ms", one.case.shape)
        for path, one in worst.items()
    ]
    above = sum(stop.stop_s > MAX_STOP_S for stop in stops)
    head = ("endpoint", "bodies", "longest stop of the event loop", "by")
    text = f"{above} of {len(stops)} bodies stopped it for over {1000 * MAX_STOP_S:.0f} ms."
    return f"## Bodies at the limits\n\n{table(head, rows)}\n\n{text}"
