"""Fields of messages are counted before protobuf reads them."""

from __future__ import annotations

import pytest
from google.protobuf.message import DecodeError, Message

from cluster.core.errors import RequestError
from gateway.grpc import messages
from gateway.grpc.messages import read_message
from gateway.offload.json_text import MAX_ENTRIES, MAX_VALUES
from protos import inference_pb2 as pb
from protos import types_pb2

GENERATE = pb.GenerateRequest.DESCRIPTOR


def field(number: int, content: bytes) -> bytes:
    """A field that has a length."""
    length, head = len(content), bytearray([number << 3 | 2])
    while length > 127:
        head.append(length & 127 | 128)
        length >>= 7
    return bytes(head) + bytes([length]) + content


TOO_MUCH = {
    "empty messages": field(4, b"\x0a\x00" * MAX_VALUES),
    "stops": field(6, b"\x6a\x00" * MAX_VALUES),
    "pairs of a map": field(6, field(10, b"\x08\x01\x11" + bytes(8)) * MAX_VALUES),
    "unknown fields": b"\xa0\x06\x01" * (MAX_VALUES + 1),
    "groups": b"\xa3\x06\xa4\x06" * MAX_VALUES,
    "values of a struct": field(4, field(4, field(1, b"") * MAX_VALUES)),
}


@pytest.mark.parametrize("name", TOO_MUCH)
def test_too_many_fields_are_not_read(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def refuse(kind: object) -> type[Message]:
        raise AssertionError("it was read")

    monkeypatch.setattr(messages, "GetMessageClass", refuse)
    with pytest.raises(RequestError, match=f"has {MAX_VALUES + 1} fields, at most") as caught:
        read_message(GENERATE, TOO_MUCH[name])
    assert caught.value.param == "message"


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (pb.GenerateRequest, field(3, field(1, b"\x81\x01" * (MAX_ENTRIES + 1)))),
        (pb.DetokenizeRequest, field(2, b"\x01" * (MAX_ENTRIES + 1))),
        (pb.InspectRequest, field(7, field(2, bytes(8 * (MAX_ENTRIES + 1))))),
    ],
)
def test_too_many_numbers_are_not_read(kind: type[Message], data: bytes) -> None:
    with pytest.raises(RequestError, match=f"has {MAX_ENTRIES + 1} numbers, at most"):
        read_message(kind.DESCRIPTOR, data)


def test_what_is_within_the_limits_is_read_as_it_is() -> None:
    request = pb.GenerateRequest(model="m")
    chat = request.messages
    chat.messages.extend(types_pb2.ChatMessage(role="user", content=f"{i}") for i in range(16_000))
    chat.chat_template_kwargs.update({"a": [1, {"b": "c"}]})
    request.sampling_params.logit_bias.update(dict.fromkeys(range(1000), 0.5))
    request.sampling_params.stop_token_ids.extend(range(-5, 10_000))
    request.sampling_params.temperature = 0.5
    data = request.SerializeToString()
    assert read_message(GENERATE, data) == request
    assert read_message(GENERATE, data + b"\xa3\x06\xa4\x06").SerializeToString() != b""


@pytest.mark.parametrize("end", [b"\x12", b"\x12\x7f", b"\xff" * 11, field(4, b"\x0a\x7f")])
def test_damaged_messages_are_refused(end: bytes) -> None:
    with pytest.raises(DecodeError):
        read_message(GENERATE, field(2, b"a" * 20_000) + end)


def test_nested_without_end_is_refused() -> None:
    inner = b""
    for _ in range(400):
        inner = field(5, field(1, field(2, inner)))  # structs within a struct
    data = field(4, field(4, field(1, field(2, inner)))) + field(2, b"a" * 20_000)
    with pytest.raises(DecodeError):
        read_message(GENERATE, data)
