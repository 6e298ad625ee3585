"""Workload of streamed completions: sends requests on a schedule and counts the outcomes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from cluster.cli.terminal.exit_codes import CommandError, ExitCode
from cluster.workload.arrivals import Arrival
from cluster.workload.tally import CompletedRequest, Tally


class RequestFailed(CommandError):
    """A request failed.

    Before the measurement, during preparation and warm-up, this ends the command.
    """

    def __init__(self, reason: str, message: str, code: ExitCode = ExitCode.FAILED) -> None:
        super().__init__(code, message)
        self.reason = reason
        """Reason under which the failure is counted, for example ``timeout``."""


class BenchTarget(Protocol):
    """A measured server, called over HTTP or gRPC."""

    async def complete(
        self, prompt: Sequence[int], max_tokens: int, on_piece: Callable[[], None]
    ) -> int:
        """Stream a completion, call ``on_piece`` for each piece, return the number of tokens.

        Raises ``RequestFailed``, ``TimeoutError`` and ``OSError``.
        """

    async def close(self) -> None:
        """Close all connections."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """Requests to send to a server, with their times and limits."""

    arrivals: Sequence[Arrival]
    """Requests of the workload, in order of time."""
    max_concurrency: int | None
    """Maximum number of concurrent requests; further requests are sent late. None: no limit."""
    vocab_size: int
    """Vocabulary size of the model; prompts are random tokens below this number."""
    seed: int
    """Seed from which the prompts are generated."""
    timeout_s: float
    """Time limit of one request, in seconds."""
    first: int = 0
    """Index of ``arrivals[0]`` in the whole workload, if this workload is a part of another."""

    def prompt(self, number: int) -> list[int]:
        """Make the prompt of the request with this index in ``arrivals``."""
        return self.arrivals[number].prompt(self.vocab_size, f"{self.seed} {self.first + number}")

    def warm_up_prompt(self) -> list[int]:
        """Make a prompt with the length of the first request's prompt and other tokens."""
        return replace(self.arrivals[0], blocks=()).prompt(self.vocab_size, f"{self.seed} -1")

    def parts(self, number: int) -> list[Workload]:
        """Divide into at most ``number`` workloads of about equally many consecutive requests."""
        size = -(-len(self.arrivals) // number)
        found = []
        for first in range(0, len(self.arrivals), size):
            chosen = self.arrivals[first : first + size]
            begin_s = chosen[0].due_s
            moved = [replace(a, due_s=a.due_s - begin_s) for a in chosen]
            found.append(replace(self, arrivals=moved, first=self.first + first))
        return found


async def warm_up(load: Workload, target: BenchTarget) -> None:
    """Send one request that is not counted. Raises ``RequestFailed`` if the request fails."""
    try:
        async with asyncio.timeout(load.timeout_s):
            await target.complete(load.warm_up_prompt(), load.arrivals[0].output_len, lambda: None)
    except TimeoutError as err:
        message = f"no answer within {load.timeout_s:g} s"
        raise RequestFailed("timeout", message, ExitCode.NOT_READY) from err
    except OSError as err:
        raise RequestFailed("connection", str(err), ExitCode.UNREACHABLE) from err


async def run_workload(
    load: Workload, target: BenchTarget, tally: Tally, tick: Callable[[], None]
) -> None:
    """Send all requests and wait for their end; ``tick`` is called after each request.

    The times of a request count from its sending; ``Tally.late_ms`` records how late a request was
    sent.
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
    load: Workload, output_len: int, prompt: list[int], target: BenchTarget, tally: Tally
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
            tally.take(CompletedRequest(pieces, clock() - start, len(prompt), tokens))
        else:
            tally.fail("empty")
