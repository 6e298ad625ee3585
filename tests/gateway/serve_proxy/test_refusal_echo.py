"""Refusals that Serve's proxy repeats for a moment."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from gateway.core.echoes import ECHOES, HOLDS
from gateway.serve_proxy import refusal_echo
from gateway.serve_proxy.refusal_echo import RefusalEcho

BODY = b'{"error":{}}'


class Full:
    """A replica that refuses everything, for 125 ms at a time."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.told: list[Any] = []
        self.is_slow = False
        """It does not answer."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        self.told.append(scope["extensions"][ECHOES])
        self.bodies.append((await receive())["body"])
        if self.is_slow:
            await asyncio.Event().wait()
        headers = {"retry-after": "2", HOLDS: "125 queue_wait", "x-request-id": "first"}
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 429, "headers": raw})
        await send({"type": "http.response.body", "body": BODY[:5], "more_body": True})
        await send({"type": "http.response.body", "body": BODY[5:]})


class Proxy:
    """The echo, before a full replica, and a clock."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.replica = Full()
        self._echo = RefusalEcho(self.replica, lambda: self.now_s)

    def ask(
        self, body: object = None, key: str = "a", path: str = "/v1/completions"
    ) -> tuple[Headers, bytes]:
        """Headers and body of a refusal."""
        return asyncio.run(self.ask_soon(body, key, path))

    async def ask_soon(
        self, body: object = None, key: str = "a", path: str = "/v1/completions"
    ) -> tuple[Headers, bytes]:
        """The same in a loop."""
        sent: list[Message] = []

        async def take(message: Message) -> None:
            sent.append(message)

        async def receive() -> Message:
            return {"type": "http.request", "body": json.dumps(body).encode()}

        headers: Sequence[tuple[bytes, bytes]] = [
            (b"authorization", key.encode()),
            (b"x-request-id", b"mine"),
        ]
        scope = {"type": "http", "method": "POST", "path": path, "headers": headers}
        await self._echo(scope, receive, take)
        assert sent[0]["status"] == 429
        return Headers(scope=sent[0]), b"".join(message.get("body", b"") for message in sent[1:])


def test_a_refusal_is_repeated_while_it_holds() -> None:
    proxy = Proxy()
    headers, body = proxy.ask()
    assert HOLDS not in headers
    assert (headers["x-request-id"], body) == ("first", BODY)
    for _ in range(3):
        headers, body = proxy.ask({"prompt": "another"})
        assert (headers["x-request-id"], headers["retry-after"], body) == ("mine", "2", BODY)
    assert len(proxy.replica.bodies) == 1
    proxy.now_s = 0.2
    proxy.ask()
    assert proxy.replica.told == [[], [("/v1/completions", "queue_wait", 3)]]
    assert proxy.ask()[0]["x-request-id"] == "mine"


def test_requests_pass_one_by_one_while_answers_are_late_and_all_of_them_a_second_later() -> None:
    async def run() -> list[int]:
        proxy, passed = Proxy(), list[int]()
        await proxy.ask_soon()
        proxy.replica.is_slow = True
        waiting = []
        for step in range(50):
            proxy.now_s = step / 32
            waiting.append(asyncio.create_task(proxy.ask_soon()))
            await asyncio.sleep(0)
            if len(proxy.replica.bodies) > 1 + len(passed):
                passed.append(step)
        for task in waiting:
            task.cancel()
        return passed

    steps = asyncio.run(run())
    assert steps == [*range(4, 36, 2), *range(36, 50)]


def test_other_keys_paths_and_priorities_reach_the_replica() -> None:
    proxy = Proxy()
    proxy.ask()
    proxy.ask(key="b")
    proxy.ask(path="/v1/chat/completions")
    proxy.ask({"priority": 1})
    assert len(proxy.replica.bodies) == 4
    assert json.loads(proxy.replica.bodies[-1]) == {"priority": 1}  # whole, though it was looked at


def test_keys_whose_refusals_hold_no_more_leave_room_for_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(refusal_echo, "_MAX_KNOWN", 2)
    proxy = Proxy()
    for key in "abc":
        proxy.ask(key=key)
    assert proxy.ask(key="c")[0]["x-request-id"] == "first"  # no room
    proxy.now_s = 1.2
    proxy.ask(key="c")
    assert proxy.ask(key="c")[0]["x-request-id"] == "mine"
