"""A client that leaves: its work in the engine ends at once, and is counted."""

from __future__ import annotations

import json
import socket
from urllib.parse import urlsplit

import pytest

from tests.gateway.stack import WAIT_S, Stack, complete


def _disconnects(stack: Stack) -> float:
    text = stack.gateway.metrics.render().decode()
    lines = [line for line in text.splitlines() if "client_disconnects_total{" in line]
    return float(lines[0].rpartition(" ")[2])


def send_raw(stack: Stack, path: str, body: dict[str, object]) -> socket.socket:
    """A request over a bare socket, so that closing it is all a client does."""
    parts = urlsplit(stack.url)
    connection = socket.create_connection((parts.hostname or "", parts.port or 0), timeout=WAIT_S)
    raw = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\n"
        f"content-length: {len(raw)}\r\n\r\n"
    )
    connection.sendall(head.encode() + raw)
    return connection


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("chat", [True, False])
def test_a_closed_socket_aborts_the_work(stack: Stack, stream: bool, chat: bool) -> None:
    stack.engine.step_s = 0.02
    before = _disconnects(stack)
    path = "/v1/chat/completions" if chat else "/v1/completions"
    prompt: dict[str, object] = {"prompt": ["x", "y"]}
    if chat:
        prompt = {"messages": [{"role": "user", "content": "x"}]}
    connection = send_raw(stack, path, {**prompt, "max_tokens": 400, "stream": stream, "n": 2})
    if stream:
        assert b"200 OK" in connection.recv(4096)
    stack.wait_for(lambda: bool(stack.engine.running), "the request")
    connection.close()
    stack.wait_for(lambda: not stack.engine.running, "the abort")
    aborted = {request_id for request_id, choices in stack.engine.aborts if not choices}
    assert aborted == {request.request_id for request in stack.engine.requests}
    stack.wait_for(lambda: _disconnects(stack) == before + 1, "the count")
    stack.wait_no_requests()


def test_a_client_that_leaves_before_its_body_is_there(stack: Stack) -> None:
    before = _disconnects(stack)
    parts = urlsplit(stack.url)
    connection = socket.create_connection((parts.hostname or "", parts.port or 0), timeout=WAIT_S)
    head = b"POST /v1/completions HTTP/1.1\r\nhost: t\r\ncontent-length: 100\r\n\r\n{"
    connection.sendall(head)
    connection.close()
    stack.wait_for(lambda: _disconnects(stack) == before + 1, "the count")
    assert not stack.engine.requests


def test_a_client_that_stays_is_not_counted(stack: Stack) -> None:
    before = _disconnects(stack)
    complete(stack, prompt="x", max_tokens=3)
    assert _disconnects(stack) == before
    assert not stack.engine.aborts
