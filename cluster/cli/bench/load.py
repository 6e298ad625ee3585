"""A load of streamed completions: sends requests on a schedule and counts their outcomes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from cluster.cli.bench.arrivals import Arrival
from cluster.cli.bench.tally import Answer, Tally
from cluster.cli.terminal.exit_codes import CommandError, ExitCode


class RequestFailed(CommandError):
    """A request without a complete answer; it ends the command where nothing can be measured."""

    def __init__(self, reason: str, message: str, code: ExitCode = ExitCode.FAILED) -> None:
        super().__init__(code, message)
        self.reason = reason
        """What failures are counted by."""


class Target(Protocol):
    """A server, by one of its protocols."""

    async def complete(
        self, prompt: Sequence[int], max_tokens: int, saw: Callable[[], None]
    ) -> int:
        """Stream a completion and call ``saw`` for each piece; returns the number of tokens.

        Raises ``RequestFailed``, ``TimeoutError`` and ``OSError``.
        """

    async def close(self) -> None:
        """Let go of all connections."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What is sent."""

    arrivals: Sequence[Arrival]
    """In order of time."""
    max_concurrency: int | None
    """Requests under way; more wait in the client, and are late. None: no limit (an open loop)."""
    vocab_size: int
    """Prompts are drawn from these tokens."""
    seed: int
    """Same seed, same prompts."""
    timeout_s: float
    """Limit of one request."""
    first: int = 0
    """Number of the first request in the load that this is a part of."""

    def prompt(self, number: int) -> list[int]:
        """Tokens of the request of this index in ``arrivals``."""
        return self.arrivals[number].prompt(self.vocab_size, f"{self.seed} {self.first + number}")

    def warm_up_prompt(self) -> list[int]:
        """As long as the first prompt, and another one."""
        return replace(self.arrivals[0], blocks=()).prompt(self.vocab_size, f"{self.seed} -1")

    def parts(self, number: int) -> list[Load]:
        """At most so many loads of about as many requests, one behind another in time."""
        size = -(-len(self.arrivals) // number)
        found = []
        for first in range(0, len(self.arrivals), size):
            chosen = self.arrivals[first : first + size]
            begin_s = chosen[0].due_s
            moved = [replace(a, due_s=a.due_s - begin_s) for a in chosen]
            found.append(replace(self, arrivals=moved, first=self.first + first))
        return found


async def warm_up(load: Load, target: Target) -> None:
    """One request that does not count. Raises ``RequestFailed``: nothing can be measured."""
    try:
        async with asyncio.timeout(load.timeout_s):
            await target.complete(load.warm_up_prompt(), load.arrivals[0].output_len, lambda: None)
    except TimeoutError as err:
        message = f"no answer within {load.timeout_s:g} s"
        raise RequestFailed("timeout", message, ExitCode.NOT_READY) from err
    except OSError as err:
        raise RequestFailed("connection", str(err), ExitCode.UNREACHABLE) from err


async def run_load(load: Load, target: Target, tally: Tally, tick: Callable[[], None]) -> None:
    """Send everything and wait for its end; ``tick`` is called after each request.

    Times of a request begin when it is sent; ``Tally.late_ms`` has how late that was.
    """
    seats = asyncio.Semaphore(load.max_concurrency or len(load.arrivals))
    clock = asyncio.get_running_loop().time
    start = clock()

    def leave(task: asyncio.Task[None]) -> None:
        seats.release()
        tick()

    async with asyncio.TaskGroup() as group:
        for number, arrival in enumerate(load.arrivals):
            prompt = load.prompt(number)
            await asyncio.sleep(max(0.0, start + arrival.due_s - clock()))
            await seats.acquire()
            tally.begin(clock() - start - arrival.due_s)
            request = _one(load, arrival.output_len, prompt, target, tally)
            group.create_task(request).add_done_callback(leave)


async def _one(
    load: Load, output_len: int, prompt: list[int], target: Target, tally: Tally
) -> None:
    clock = asyncio.get_running_loop().time
    pieces: list[float] = []
    start = clock()
    try:
        async with asyncio.timeout(load.timeout_s):
            tokens = await target.complete(
                prompt, output_len, lambda: pieces.append(clock() - start)
            )
    except RequestFailed as err:
        tally.fail(err.reason)
    except TimeoutError:
        tally.fail("timeout")
    except OSError:
        tally.fail("connection")
    else:
        if pieces:
            tally.take(Answer(pieces, clock() - start, len(prompt), tokens))
        else:
            tally.fail("empty")
