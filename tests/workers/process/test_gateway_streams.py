"""What waits for each gateway, and what is left of a stream that ends."""

from __future__ import annotations

import asyncio

import pytest

from workers.process.gateway_streams import MAX_PENDING_MESSAGES, GatewayStream, GatewayStreams
from workers.process.intake.commands import AddRequest, GatewayCommand, GatewayDisconnected, Inbox
from workers.requests.request import Queued, Request, SamplingParams, SoloStep
from workers.requests.wire import FROM_ENGINE, Abort, Ping, ToEngine

REQUEST = Request(request_id="r", prompt=(1, 2), params=SamplingParams())


class Case:
    """Streams, their commands, and the handlers that were cancelled."""

    def __init__(self) -> None:
        self.inbox = Inbox(lambda: None)
        self.streams = GatewayStreams(self.inbox, 5.0)
        self.cancelled: list[str] = []

    def open(self, gateway: str) -> GatewayStream:
        return self.streams.open(gateway, lambda: self.cancelled.append(gateway))

    def commands(self) -> list[GatewayCommand]:
        return self.inbox.take()


def _all(stream: GatewayStream) -> list[bytes]:
    """Everything that the gateway still gets."""

    async def read() -> list[bytes]:
        found = []
        while (message := await stream.next()) is not None:
            found.append(message)
        return found

    return asyncio.run(read())


def test_a_gateway_too_far_behind_misses_nothing_in_the_middle() -> None:
    case = Case()
    slow, other = case.open("slow"), case.open("other")
    sent = [str(number).encode() for number in range(MAX_PENDING_MESSAGES + 10)]
    for message in sent:
        case.streams.put(slow.name, message)
    case.streams.put(other.name, b"next")
    other.close()
    got = _all(slow)
    assert got == sent[: len(got)]
    assert slow.error == f"it has not read {MAX_PENDING_MESSAGES} messages"
    assert case.cancelled == ["slow"]
    assert case.commands() == [GatewayDisconnected(slow.name)]
    assert (_all(other), other.error) == ([b"next"], "")


@pytest.mark.parametrize("message", [REQUEST, Abort(request_id="r"), Ping(number=1)])
@pytest.mark.parametrize("is_dropped", [False, True])
def test_what_is_read_after_the_end_is_for_nobody(message: ToEngine, is_dropped: bool) -> None:
    case = Case()
    stream = case.open("gateway-0")
    case.streams.handle_message(Ping(number=0), stream, 10.0)
    if is_dropped:
        case.streams.drop_silent(20.0, 19.0)
    else:
        case.streams.forget(stream)
    assert case.commands() == [GatewayDisconnected(stream.name)]
    case.streams.handle_message(message, stream, 21.0)
    case.streams.forget(stream)
    assert case.commands() == []
    case.streams.drop_silent(40.0, 39.0)  # nobody is left to be silent
    assert len(case.cancelled) == is_dropped


def test_messages_become_commands_under_the_name_of_their_stream() -> None:
    case = Case()
    first, second = case.open("g"), case.open("g")
    turn = SoloStep(request_id="r", attempt=1)
    case.streams.handle_message(REQUEST, first, 10.0)
    case.streams.handle_message(turn, second, 11.0)
    case.streams.handle_message(Ping(number=7), second, 12.0)
    added, noted = case.commands()
    assert added == AddRequest(first.name, REQUEST, 10.0)
    assert (noted.gateway, first.name) == (second.name, "g#0")
    second.close("first reason")
    second.close("second reason")
    case.streams.put(second.name, b"late")
    assert _all(second) == [FROM_ENGINE.encode(Ping(number=7))]
    assert second.error == "first reason"


def test_a_message_that_cannot_be_encoded_ends_its_stream_alone() -> None:
    case = Case()
    broken, other = case.open("broken"), case.open("other")
    queued = Queued(request_id="r", attempt=1)
    for attempt in (1, 1 << 64, 2):  # msgpack has no longer integers
        case.streams.send(broken.name, Queued(request_id="r", attempt=attempt))
    case.streams.send(other.name, queued)
    other.close()
    assert _all(broken) == [FROM_ENGINE.encode(queued)]
    assert broken.error == "a message could not be encoded"
    assert case.cancelled == ["broken"]
    assert case.commands() == [GatewayDisconnected(broken.name)]
    assert (_all(other), other.error) == ([FROM_ENGINE.encode(queued)], "")
