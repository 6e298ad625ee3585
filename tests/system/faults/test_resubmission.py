"""An attention worker dies in the middle of requests of every kind: their answers show nothing."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import threading
from dataclasses import dataclass
from typing import Any

import pytest

from benchmarks.harness.cluster_gateway import gateway_of
from benchmarks.harness.mixed_calls import WORDS
from benchmarks.harness.serving_cluster import ThreadCluster, ThreadWorkerGroup, serving
from cluster.core.errors import DeadlineExceededError
from cluster.core.placement import ExpertPlacement
from cluster.core.topology import Generation
from gateway.calls.answer import collect
from gateway.calls.gateway import Gateway
from gateway.calls.inspect import InspectFields, InspectionService
from gateway.calls.pooling import PoolingService, make_pooling_call
from gateway.core.call import CallKind, GenerateCall
from gateway.core.delta import ChoiceDelta
from tests.harness.fault_rows import blocks_held, quiet_config
from tests.harness.poison import POISON, PoisonedGroup
from tests.harness.tiers import quick_rows
from workers.process.context import WorkerContext
from workers.process.worker.worker import Worker

LIMIT_S = 120.0


def prompt(length: int, seed: int) -> tuple[int, ...]:
    """Marked: a worker may die in a step with it."""
    draw = random.Random(seed)
    return (POISON, *(draw.randrange(4, 1000) for _ in range(length - 1)))


PLAIN = GenerateCall(
    kind=CallKind.COMPLETION,
    min_tokens=30,
    max_tokens=50,
    temperature=1.0,
    logprobs=2,
    ignore_eos=True,
)
GENERATED: dict[str, dict[str, Any]] = {
    "three choices": {"n": 3, "seed": 5},
    "three choices with stop strings": {"n": 3, "seed": 6, "stop": ("e ", "a", "th"), "top_p": 0.9},
    "echo with prompt logprobs": {"echo": True, "prompt_logprobs": 1, "seed": 7, "n": 2},
    "scored only": {"echo": True, "max_tokens": 0, "min_tokens": 0},
    "penalties": {"frequency_penalty": 0.7, "repetition_penalty": 1.3, "seed": 8, "n": 2},
    "bad words": {"bad_words": (" the", "e"), "seed": 9, "presence_penalty": 0.4},
    "grammar": {"grammar": WORDS, "seed": 10, "n": 2},
    "beams": {"use_beam_search": True, "n": 4},
    "beams that end": {
        "use_beam_search": True,
        "n": 3,
        "length_penalty": 2.0,
        "min_tokens": 5,
        "stop_token_ids": tuple(range(100, 400)),
    },
    "urgent": {"priority": -3, "temperature": 0.0},
}


async def generate(gateway: Gateway, name: str, fields: GenerateCall) -> Any:
    """Everything that a client gets, and the usage."""
    with await gateway.start(_timed(fields, LIMIT_S), name) as generation:
        choices = [_untimed(choice) for choice in await collect(generation)]
    return choices, generation.usage


def _timed(fields: GenerateCall, timeout_s: float) -> GenerateCall:
    return dataclasses.replace(fields, timeout_s=timeout_s)


def _untimed(choice: ChoiceDelta) -> ChoiceDelta:
    assert choice.finish is not None
    return dataclasses.replace(choice, finish=dataclasses.replace(choice.finish, timings=None))


async def read(gateway: Gateway) -> Any:
    """Pooling calls of every kind, with prompts of several steps."""
    reader, options = PoolingService(gateway), make_pooling_call(timeout_s=LIMIT_S)
    long, other = prompt(400, 1), prompt(300, 2)
    fields = InspectFields(
        token_ids=(long[:90], other[:70]),
        outputs=("logits", "hidden_states", "routes", "loss", "aux_loss"),
    )

    async def inspect() -> Any:
        async with InspectionService(gateway).inspect(fields, options, 64 << 20) as found:
            return found

    embedded, mean, scored, classified, inspected = await asyncio.gather(
        reader.embed([long, other], "last", options),
        reader.embed([long, other], "mean", options),
        reader.score([long], [other[:5], other[5:9]], options),
        reader.classify([long], [" lord", " king"], (), options),
        inspect(),
    )
    vectors = [v.tobytes() for v in (*embedded.rows, *mean.rows)]
    answers = (embedded, mean, scored, classified, inspected)
    counts = [one.usage.prompt_tokens for one in answers]  # what was cached depends on the others
    return vectors, counts, [dataclasses.replace(one, usage=None) for one in answers[2:]]


async def ask_everything(gateway: Gateway) -> list[Any]:
    """All calls at once, twice, so that each worker has some of each kind."""
    asked = [
        generate(gateway, f"{name}-{i}", fields)
        for i in range(2)
        for name, fields in calls(i).items()
    ]
    return list(await asyncio.gather(*asked, read(gateway), read(gateway)))


def calls(turn: int) -> dict[str, GenerateCall]:
    return {
        name.replace(" ", "-"): dataclasses.replace(
            PLAIN, prompts=(prompt(20 + 7 * i, 10 * turn + i),), **fields
        )
        for i, (name, fields) in enumerate(GENERATED.items())
    }


@dataclass
class DieAt:
    """One worker dies in the marked step of that number; 0 is none."""

    number: int
    num_steps: int = 0

    def __call__(self, group: ThreadWorkerGroup) -> None:
        self.num_steps += 1
        if self.num_steps == self.number:
            raise RuntimeError("it dies here")


def answers(number: int) -> tuple[list[Any], int]:
    """What came of all requests, and how many of them went on elsewhere."""
    cluster = ThreadCluster(quiet_config(2, 1), PoisonedGroup(DieAt(number)))
    with serving(cluster), gateway_of(cluster) as gateway:
        found = gateway.run(ask_everything(gateway.gateway))
        cluster.wait(lambda snapshot: blocks_held(snapshot) == 0, fresh=True)
        lost = [w["name"] for w in cluster.snapshot()["workers"] if w["state"] == "LOST"]
        assert len(lost) == (number > 0)
        return found, gateway.num_resubmitted


@pytest.mark.parametrize("number", quick_rows({15}, [15, 60]))
def test_every_kind_of_request_goes_on_as_if_nothing_had_been(number: int) -> None:
    expected, none = answers(0)
    assert none == 0
    found, resubmitted = answers(number)
    assert resubmitted > 0
    for name, (mine, other) in enumerate(zip(found, expected, strict=True)):
        assert mine == other, name


def is_undisturbed(gateway: Gateway) -> bool:
    """Whether it knows of no loss; a busy gateway may see the recovery's end first."""
    snapshot = gateway.cluster.snapshot or {}
    return (snapshot["generation"], snapshot["state"] == "RECOVERING") == (1, False)


async def ask_some(gateway: Gateway, died: DieAt) -> list[Any]:
    """Calls that are under way when the worker dies, and one that comes while there is none."""
    asked = [
        asyncio.create_task(generate(gateway, name, fields)) for name, fields in calls(0).items()
    ]
    while died.number and is_undisturbed(gateway):
        await asyncio.sleep(0.01)
    fields = dataclasses.replace(PLAIN, prompts=(prompt(9, 99),), seed=4)
    late = generate(gateway, "late", fields)
    return [*await asyncio.gather(*asked), await late]


def test_requests_of_the_only_worker_wait_for_the_one_in_its_place() -> None:
    found = []
    for number in (0, 20):
        died = DieAt(number)
        cluster = ThreadCluster(quiet_config(1, 1), PoisonedGroup(died))
        with serving(cluster), gateway_of(cluster) as gateway:
            found.append(gateway.run(ask_some(gateway.gateway, died)))
            assert (gateway.num_resubmitted > 0) is (number > 0)
            cluster.wait(lambda snapshot: blocks_held(snapshot) == 0, fresh=True)
    assert found[0] == found[1]


class HeldGroup(PoisonedGroup):
    """A worker dies in its ``number``-th marked step; the next generation waits to be let go."""

    def __init__(self, number: int) -> None:
        super().__init__(DieAt(number))
        let_go = self.let_go = threading.Event()

        class Expert(Worker):
            def load(self, context: WorkerContext) -> dict[str, Any]:
                info = super().load(context)
                role = self.roles.experts
                assert role is not None
                enter = role.enter

                def enter_late(generation: Generation, placement: ExpertPlacement) -> None:
                    if generation.number > 1:
                        assert let_go.wait(LIMIT_S)
                    enter(generation, placement)

                role.enter = enter_late  # type: ignore[method-assign]
                return info

        self._by_role = {**self._by_role, "expert": Expert}


def test_deadlines_and_cancellation_hold_while_recovering() -> None:
    group = HeldGroup(20)
    config = quiet_config(2, 1)
    patience = dataclasses.replace(config.transport, connect_timeout_s=LIMIT_S)
    cluster = ThreadCluster(dataclasses.replace(config, transport=patience), group)
    with serving(cluster), gateway_of(cluster) as gateway:
        gateway.run(recover_slowly(gateway.gateway, cluster, group))
        cluster.wait(lambda snapshot: blocks_held(snapshot) == 0, fresh=True)


async def num_requests(cluster: ThreadCluster) -> int:
    """Requests that workers hold."""
    workers = (await cluster.actor.snapshot(True))["workers"]
    names = ("num_requests_running", "num_requests_waiting")
    alive = [worker["stats"] for worker in workers if worker["state"] != "LOST"]
    return int(sum(stats.get(name, 0.0) for stats in alive for name in names))


async def recover_slowly(gateway: Gateway, cluster: ThreadCluster, group: HeldGroup) -> None:
    plain = dataclasses.replace(PLAIN, min_tokens=100, max_tokens=120)
    fields = [dataclasses.replace(plain, prompts=(prompt(40, i),)) for i in range(6)]
    patient = [asyncio.create_task(generate(gateway, f"patient-{i}", fields[i])) for i in (0, 1)]
    cancelled = [asyncio.create_task(generate(gateway, f"gone-{i}", fields[i])) for i in (2, 3)]
    hasty = [await gateway.start(_timed(fields[i], 3.0), f"hasty-{i}") for i in (4, 5)]
    while (gateway.cluster.snapshot or {})["state"] != "RECOVERING":
        await asyncio.sleep(0.01)
    for task in cancelled:
        task.cancel()
    for generation in hasty:
        with generation, pytest.raises(DeadlineExceededError):
            await collect(generation)
    with pytest.raises(DeadlineExceededError, match="recovering"):
        await gateway.start(_timed(fields[0], 0.3), "new")
    while await num_requests(cluster) != len(patient):
        await asyncio.sleep(0.01)
    assert (gateway.cluster.snapshot or {})["state"] == "RECOVERING"
    group.let_go.set()
    for choices, usage in await asyncio.gather(*patient):
        assert usage.completion_tokens == len(choices[0].tokens) >= 100
    admission = gateway.admission.admission
    assert admission is not None
    assert admission.num_requests == 0
