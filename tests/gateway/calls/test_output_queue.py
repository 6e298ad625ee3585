"""Outputs that wait for a client: bounded by the memory that they take."""

from __future__ import annotations

import asyncio

import pytest
from msgspec.structs import replace

from cluster.core.errors import RequestAbortedError
from gateway.calls.output_queue import CallRegistry, OutputQueue
from gateway.core.errors import SlowClientError
from tests.gateway.fakes import fake_logprob
from tests.gateway.stack import WAIT_S
from workers.requests.request import FinishReason, PromptLogprobs, TokenOutput

OUTPUT = TokenOutput(request_id="r", attempt=0, choice=0, index=0, token_ids=(5,))
LIKELY = replace(OUTPUT, logprobs=(fake_logprob(5, 20),))


async def put_until_full(queue: OutputQueue, output: TokenOutput) -> int:
    """How many outputs found room; afterwards nothing waits but the error."""
    ends: list[None] = []
    queue.on_overflow = lambda: ends.append(None)
    count = 0
    while not ends:
        queue.put(output)
        count += 1
    for _ in range(2):
        with pytest.raises(SlowClientError, match="too slowly"):
            await queue.take(WAIT_S)
    return count - 1


def test_queues_are_bounded() -> None:
    assert asyncio.run(put_until_full(OutputQueue(350_000), OUTPUT)) == 1000


def test_log_probabilities_count() -> None:
    assert asyncio.run(put_until_full(OutputQueue(350_000), LIKELY)) == 350_000 // 2920


def test_what_was_taken_makes_room() -> None:
    async def work() -> None:
        queue = OutputQueue(350_000)
        for _ in range(3):
            for _ in range(1000):
                queue.put(OUTPUT)
            assert len(await queue.take(WAIT_S)) == 1000

    asyncio.run(work())


def test_what_nobody_takes_for_long_ends_the_call() -> None:
    async def work() -> None:
        ends: list[None] = []
        times = [0.0, 59.0, 60.0, 60.0, 100.0, 160.0, 161.0]
        queue = OutputQueue(350_000, limit_s=60.0, clock=iter(times).__next__)
        queue.on_overflow = lambda: ends.append(None)
        for _ in range(3):
            queue.put(OUTPUT)
        assert len(await queue.take(WAIT_S)) == 3
        for _ in range(2):
            queue.put(OUTPUT)
        assert not ends, "the time before they came does not count"
        queue.put(OUTPUT)
        assert len(ends) == 1
        with pytest.raises(SlowClientError, match="has read nothing for 60 s"):
            await queue.take(WAIT_S)

    asyncio.run(work())


def test_one_output_of_any_size_has_room() -> None:
    async def work() -> list[TokenOutput]:
        queue = OutputQueue(1)
        queue.put(LIKELY)
        return await queue.take(WAIT_S)

    assert asyncio.run(work()) == [LIKELY]


def test_log_probabilities_of_a_prompt_do_not_count() -> None:
    async def work() -> list[TokenOutput]:
        queue, scores = OutputQueue(1000), [fake_logprob(token, 20) for token in range(500)]
        queue.put(replace(OUTPUT, prompt_logprobs=PromptLogprobs.of(scores)))
        queue.put(OUTPUT)
        return await queue.take(WAIT_S)

    assert len(asyncio.run(work())) == 2


def test_an_empty_queue_gives_nothing_in_time() -> None:
    async def work() -> list[TokenOutput]:
        return await OutputQueue(1000).take(0.01)

    assert asyncio.run(work()) == []


def test_outputs_within_the_interval_are_taken_together() -> None:
    async def work() -> tuple[list[int], float]:
        loop = asyncio.get_running_loop()
        queue = OutputQueue(350_000, interval_s=lambda: 0.05)
        queue.put(OUTPUT)
        sizes = [len(await queue.take(WAIT_S))]  # the first one waits for nothing
        began_s = loop.time()
        taking = asyncio.create_task(queue.take(WAIT_S))
        await asyncio.sleep(0)
        for _ in range(3):
            queue.put(OUTPUT)
        sizes.append(len(await taking))
        return sizes, loop.time() - began_s

    sizes, seconds = asyncio.run(work())
    assert sizes == [1, 3]
    assert seconds > 0.04


def test_the_end_of_a_choice_is_taken_at_once() -> None:
    async def work() -> list[TokenOutput]:
        queue = OutputQueue(350_000, interval_s=lambda: 2 * WAIT_S)
        queue.put(OUTPUT)
        await queue.take(WAIT_S)
        taking = asyncio.create_task(queue.take(2 * WAIT_S))
        await asyncio.sleep(0)
        queue.put(OUTPUT)
        queue.put(replace(OUTPUT, finish_reason=FinishReason.LENGTH))
        return await asyncio.wait_for(taking, WAIT_S)

    assert len(asyncio.run(work())) == 2


def test_a_failure_ends_the_interval() -> None:
    async def work() -> list[TokenOutput]:
        queue = OutputQueue(350_000, interval_s=lambda: 2 * WAIT_S)
        queue.put(OUTPUT)
        await queue.take(WAIT_S)
        taking = asyncio.create_task(queue.take(2 * WAIT_S))
        await asyncio.sleep(0)
        queue.put(OUTPUT)
        queue.fail(RequestAbortedError("the request was ended by an operator"))
        return await asyncio.wait_for(taking, WAIT_S)

    assert asyncio.run(work()) == [OUTPUT]


@pytest.mark.parametrize(
    ("num_cpus", "num_calls", "interval_s"),
    [(2, 0, 0.0), (2, 1, 0.0004), (2, 25, 0.01), (2, 1000, 0.02), (64, 25, 0.0003125)],
)
def test_the_interval_grows_with_the_calls_of_each_processor(
    num_cpus: int, num_calls: int, interval_s: float
) -> None:
    calls = CallRegistry(num_cpus)
    for number in range(num_calls):
        calls.add(str(number), OutputQueue(1000))
    assert calls.interval_s() == pytest.approx(interval_s)
