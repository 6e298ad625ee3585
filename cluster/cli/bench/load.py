"""A load of streamed completions: sends requests on a schedule and counts their outcomes."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

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

    num_prompts: int
    request_rate: float
    """Mean requests a second, infinity sends all at once. Gaps are exponential."""
    max_concurrency: int
    """Requests under way; more wait here, and their time does not count."""
    input_len: int
    """Tokens of each prompt."""
    output_len: int
    """Tokens of each answer."""
    vocab_size: int
    """Prompts are drawn from these tokens."""
    seed: int
    """Same seed, same prompts and gaps."""
    timeout_s: float
    """Limit of one request."""

    def prompt(self, number: int) -> list[int]:
        """Tokens of one request; -1 is the warm-up."""
        draw = random.Random(f"{self.seed} {number}")
        return draw.choices(range(self.vocab_size), k=self.input_len)

    def arrival_gaps_s(self) -> random.Random:
        """Where the gaps come from."""
        return random.Random(f"{self.seed} gaps")


async def warm_up(load: Load, target: Target) -> None:
    """One request that does not count. Raises ``RequestFailed``: nothing can be measured."""
    try:
        async with asyncio.timeout(load.timeout_s):
            await target.complete(load.prompt(-1), load.output_len, lambda: None)
    except TimeoutError as err:
        message = f"no answer within {load.timeout_s:g} s"
        raise RequestFailed("timeout", message, ExitCode.NOT_READY) from err
    except OSError as err:
        raise RequestFailed("connection", str(err), ExitCode.UNREACHABLE) from err


async def run_load(load: Load, target: Target, tally: Tally, tick: Callable[[], None]) -> None:
    """Send everything and wait for its end; ``tick`` is called after each request."""
    seats = asyncio.Semaphore(load.max_concurrency)
    draw = load.arrival_gaps_s()
    clock = asyncio.get_running_loop().time
    due = clock()

    def leave(task: asyncio.Task[None]) -> None:
        seats.release()
        tick()

    async with asyncio.TaskGroup() as group:
        for number in range(load.num_prompts):
            await asyncio.sleep(max(0.0, due - clock()))
            await seats.acquire()
            task = group.create_task(_one(load, number, target, tally))
            task.add_done_callback(leave)
            if math.isfinite(load.request_rate):
                due += draw.expovariate(load.request_rate)


async def _one(load: Load, number: int, target: Target, tally: Tally) -> None:
    clock = asyncio.get_running_loop().time
    prompt = load.prompt(number)
    pieces: list[float] = []
    tally.begin()
    start = clock()
    try:
        async with asyncio.timeout(load.timeout_s):
            tokens = await target.complete(
                prompt, load.output_len, lambda: pieces.append(clock() - start)
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
