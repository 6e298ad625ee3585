"""Clients of the chaos: mixed requests whose answers are known, and what becomes of them.

They ask over HTTP and gRPC: whole answers and streams, several choices, grammars, penalties, within
sessions and without. Some leave, some have a deadline, some read slowly. Every client draws its
requests with a generator of its own, so that a seed repeats them whatever the others do.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import grpc
import httpx

from benchmarks.harness.server import Served
from protos.inference_pb2 import GenerateRequest
from protos.inference_pb2_grpc import InferenceStub
from protos.types_pb2 import SamplingParams

_NUM_CALLS = 24
"""Different calls, whose answers are known."""
_NUM_CLIENTS = 8
_LIMIT_S = 120.0
_BROKEN_S = 20.0
"""Time after the loss of a gateway in which streams may break, and calls be refused."""


@dataclass(frozen=True, slots=True)
class Call:
    """One request."""

    body: dict[str, Any]
    """Of ``/v1/completions``."""

    def grpc_request(self) -> GenerateRequest:
        """The same over gRPC, where that is as plain."""
        params = SamplingParams(
            max_tokens=self.body["max_tokens"],
            temperature=self.body["temperature"],
            seed=self.body["seed"],
            ignore_eos=True,
        )
        session = self.body.get("session_id")
        return GenerateRequest(text=self.body["prompt"], sampling_params=params, session_id=session)

    @property
    def is_plain(self) -> bool:
        """One choice without anything that differs between the protocols."""
        return not self.body.keys() & {
            "n",
            "frequency_penalty",
            "repetition_penalty",
            "structured_outputs",
        }


class Choice(NamedTuple):
    """What came of one choice."""

    tokens: list[int]
    text: str


@dataclass(slots=True)
class Seen:
    """What the clients saw."""

    outcomes: Counter[str] = field(default_factory=Counter)
    """By kind of request and its outcome."""
    tokens: Counter[str] = field(default_factory=Counter)
    """``lost``, ``altered`` and ``duplicated``, in answers and in beginnings of answers."""
    wrong: list[str] = field(default_factory=list)
    """Answers that differ, and calls that failed without a reason."""
    pauses_ms: list[float] = field(default_factory=list)
    """Longest time between two events of each stream."""
    broken_until: float = float("-inf")
    """Monotonic time up to which calls begin that a lost gateway may break."""

    def may_break(self) -> None:
        """A gateway is lost now."""
        self.broken_until = time.monotonic() + _BROKEN_S

    def check(self, kind: str, got: Sequence[Choice], known: Sequence[Choice]) -> None:
        """A whole answer."""
        self.outcomes[f"{kind}: whole"] += 1
        for mine, right in zip(got, known, strict=True):
            self._compare(kind, mine, right)
            num_lost = max(len(right.tokens) - len(mine.tokens), 0)
            self.tokens["lost"] += num_lost
            if num_lost:
                self.wrong.append(f"{kind}: {num_lost} tokens are missing at the end")
            if mine.tokens == right.tokens and mine.text != right.text:
                self.wrong.append(f"{kind}: the text is {mine.text!r}, not {right.text!r}")

    def check_begun(self, kind: str, got: Sequence[Choice], known: Sequence[Choice]) -> None:
        """The beginning of an answer."""
        for mine, right in zip(got, known, strict=True):
            self._compare(kind, mine, right)
            if not right.text.startswith(mine.text):
                self.wrong.append(f"{kind}: {mine.text!r} is no beginning of {right.text!r}")

    def broke(self, kind: str, began: float, why: str, is_lost: bool) -> None:
        """A call failed that began at that monotonic time. Only the loss of a gateway is a
        reason, which a slow reader may find late. ``is_lost``: it failed as then: without an end,
        or unavailable."""
        if is_lost and began < self.broken_until:
            self.outcomes[f"{kind}: lost with its gateway"] += 1
        else:
            self.outcomes[f"{kind}: failed"] += 1
            self.wrong.append(f"{kind}: {why}"[:300])

    @property
    def num_failed(self) -> int:
        """Calls that failed without a reason."""
        return sum(n for name, n in self.outcomes.items() if name.endswith(": failed"))

    def _compare(self, kind: str, mine: Choice, right: Choice) -> None:
        altered = sum(a != b for a, b in zip(mine.tokens, right.tokens, strict=False))
        self.tokens["altered"] += altered
        self.tokens["duplicated"] += max(len(mine.tokens) - len(right.tokens), 0)
        if altered or len(mine.tokens) > len(right.tokens):
            self.wrong.append(f"{kind}: the tokens are {mine.tokens}, not {right.tokens}"[:400])


class _AnswerError(Exception):
    """An answer that is none, as text.

    Args:
        why: the text.
        is_lost: it may be so where a gateway is lost.
    """

    def __init__(self, why: str, is_lost: bool) -> None:
        super().__init__(why)
        self.is_lost = is_lost

    @classmethod
    def of(cls, status: int, text: str) -> _AnswerError:
        """Of an answer that is not 200."""
        return cls(f"{status} {text}", status == 503)


class Clients:
    """They ask again and again."""

    def __init__(self, server: Served, seed: int) -> None:
        self.seen = Seen()
        self._seed = seed
        draw = random.Random(f"calls of {seed}")
        self._calls = [Call(_draw_body(draw, number)) for number in range(_NUM_CALLS)]
        self._plain = [n for n, call in enumerate(self._calls) if call.is_plain]
        self._known: list[list[Choice]] = []
        self._http = httpx.AsyncClient(
            base_url=server.http, timeout=_LIMIT_S, limits=httpx.Limits(max_connections=None)
        )
        self._channel = grpc.aio.insecure_channel(server.grpc)
        self._stub = InferenceStub(self._channel)

    async def learn(self) -> None:
        """Ask for every answer once, while nothing happens."""
        for call in self._calls:
            answer = await self._http.post("/v1/completions", json=call.body)
            answer.raise_for_status()
            self._known.append(_choices(answer))

    async def run(self, until: Callable[[], bool]) -> None:
        """All clients, until it is so."""
        draws = (random.Random(f"client {i} of {self._seed}") for i in range(_NUM_CLIENTS))
        await asyncio.gather(*(self._client(draw, until) for draw in draws))

    async def close(self) -> None:
        """End all connections."""
        await self._http.aclose()
        await self._channel.close(None)

    async def _client(self, draw: random.Random, until: Callable[[], bool]) -> None:
        kinds: Sequence[tuple[float, Callable[[int, random.Random], Awaitable[None]]]] = (
            (0.35, self._whole),
            (0.25, self._stream),
            (0.15, self._grpc),
            (0.10, self._leave),
            (0.05, self._deadline),
            (0.10, self._read_slowly),
        )
        while not until():
            ((_, ask),) = draw.choices(kinds, [weight for weight, _ in kinds])
            number = draw.randrange(_NUM_CALLS)
            kind, began = ask.__name__.strip("_").replace("_", " "), time.monotonic()
            try:
                await ask(number, random.Random(draw.random()))
            except httpx.HTTPError as err:
                self.seen.broke(kind, began, f"{type(err).__name__} {err}", True)
            except grpc.aio.AioRpcError as err:
                is_lost = err.code() is grpc.StatusCode.UNAVAILABLE
                self.seen.broke(kind, began, f"{type(err).__name__} {err}", is_lost)
            except _AnswerError as err:
                self.seen.broke(kind, began, str(err), err.is_lost)
            else:
                continue
            await asyncio.sleep(0.5)

    async def _whole(self, number: int, draw: random.Random) -> None:
        answer = await self._http.post("/v1/completions", json=self._calls[number].body)
        if answer.status_code != 200:
            raise _AnswerError.of(answer.status_code, answer.text)
        self.seen.check("whole", _choices(answer), self._known[number])

    async def _stream(self, number: int, draw: random.Random) -> None:
        await self._read("stream", number)

    async def _leave(self, number: int, draw: random.Random) -> None:
        await self._read("leave", number, leave_after=draw.randint(1, 30))

    async def _read_slowly(self, number: int, draw: random.Random) -> None:
        await self._read("read slowly", number, pause_s=0.05)

    async def _read(
        self, kind: str, number: int, leave_after: int | None = None, pause_s: float = 0.0
    ) -> None:
        """A stream over HTTP; what came of it is compared however it ends."""
        known, is_whole = self._known[number], False
        got, times = [Choice([], "") for _ in known], list[float]()
        body = {**self._calls[number].body, "stream": True}
        try:
            async with self._http.stream("POST", "/v1/completions", json=body) as response:
                if response.status_code != 200:
                    text = (await response.aread()).decode()
                    raise _AnswerError.of(response.status_code, text)
                async for line in response.aiter_lines():
                    if is_whole := line == "data: [DONE]":
                        self._note_pause(times)
                        return
                    if not line.startswith("data: "):
                        continue
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise _AnswerError(line, event["error"]["type"] == "service_unavailable")
                    _add(got, event)
                    times.append(time.monotonic())
                    if leave_after is not None and len(times) >= leave_after:
                        self.seen.outcomes[f"{kind}: left"] += 1
                        return
                    await asyncio.sleep(pause_s)
            raise _AnswerError("the stream ended without an end", True)
        finally:
            if is_whole:
                self.seen.check(kind, got, known)
            else:
                self.seen.check_begun(kind, got, known)

    async def _grpc(self, number: int, draw: random.Random) -> None:
        number = self._plain[number % len(self._plain)]
        tokens, text, times = list[int](), "", list[float]()
        request = self._calls[number].grpc_request()
        async for part in self._stub.GenerateStream(request, timeout=_LIMIT_S):
            tokens += part.token_ids
            text += part.text
            times.append(time.monotonic())
        self._note_pause(times)
        self.seen.check("grpc", [Choice(tokens, text)], self._known[number])

    async def _deadline(self, number: int, draw: random.Random) -> None:
        """A limit that may be too short."""
        limit = {"x-request-timeout-ms": str(draw.randint(50, 500))}
        body = self._calls[number].body
        answer = await self._http.post("/v1/completions", json=body, headers=limit)
        if answer.status_code == 200:
            self.seen.check("deadline", _choices(answer), self._known[number])
        elif answer.status_code in (408, 504):
            self.seen.outcomes["deadline: over"] += 1
        else:
            raise _AnswerError.of(answer.status_code, answer.text)

    def _note_pause(self, times: Sequence[float]) -> None:
        if len(times) > 1:
            self.seen.pauses_ms.append(1000 * max(b - a for a, b in pairwise(times)))


def _choices(answer: httpx.Response) -> list[Choice]:
    found = answer.json()["choices"]
    return [Choice(choice["token_ids"], choice["text"]) for choice in found]


def _add(got: list[Choice], event: dict[str, Any]) -> None:
    """Add what an event of a stream brings."""
    for choice in event["choices"]:
        tokens, text = got[choice["index"]]
        got[choice["index"]] = Choice(tokens + (choice["token_ids"] or []), text + choice["text"])


def _draw_body(draw: random.Random, number: int) -> dict[str, Any]:
    words = draw.choices(("the", "king", "of", "love", "and", "no", "more", "sword"), k=40)
    body: dict[str, Any] = {
        "prompt": f"{number} {' '.join(words[: draw.randint(1, 40)])}",
        "max_tokens": draw.randint(40, 300),
        "temperature": draw.choice((0.0, 0.7, 1.0)),
        "seed": draw.randrange(10**6),
        "ignore_eos": True,
        "return_token_ids": True,
    }
    if number % 4:  # copied to the other worker, from which the next ones go on
        body["session_id"] = f"session {number}"
    extra = number % 6
    if extra == 0:
        body |= {"n": 2, "frequency_penalty": 0.5}
    elif extra == 1:
        body["structured_outputs"] = {"regex": "([a-z]{3,9} ){99}"}
    elif extra == 2:
        body["repetition_penalty"] = 1.2
    return body
