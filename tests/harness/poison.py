"""Workers that die of a poisonous request: a hook that only tests have.

A request whose prompt has the token ``POISON`` kills in every step that it is in.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from benchmarks.harness.mixed_calls import make_calls
from benchmarks.harness.serving_cluster import ThreadWorkerGroup
from gateway.core.call import GenerateCall
from workers.engine.step_result import StepResult
from workers.process.context import WorkerContext
from workers.process.worker.actor import AttentionWorker
from workers.process.worker.worker import OnDeath, Worker
from workers.process.worker_args import WorkerArgs
from workers.requests.step_header import StepHeader
from workers.scheduling.step_plan import StepPlan

POISON = 1020
"""Token that no other prompt of the tests has."""


def poisonous_call(num_tokens: int = 20) -> GenerateCall:
    """A call that kills."""
    (call,) = make_calls(1, num_tokens)
    return replace(call, prompts=((5, POISON, 7),))


class PoisonedAttention(Worker):
    """Calls ``kill`` before it runs a step with a poisonous request: by default it dies itself."""

    def kill(self) -> None:
        """As ``kill -9`` does."""
        os.kill(os.getpid(), signal.SIGKILL)

    def load(self, context: WorkerContext) -> dict[str, Any]:
        info = super().load(context)
        assert self.roles.attention is not None
        runner = self.roles.attention.engine.runner
        run = runner.run

        def run_poisoned(
            header: StepHeader, plan: StepPlan, *, is_ahead: bool = False
        ) -> StepResult | None:
            if any(POISON in planned.sequence.request.prompt for planned in plan.rows):
                self.kill()
            return run(header, plan, is_ahead=is_ahead)

        runner.run = run_poisoned  # type: ignore[method-assign]
        return info


class PoisonedWorker(AttentionWorker):
    """Its actor."""

    def _make_worker(self, args: WorkerArgs, on_death: OnDeath) -> Worker:
        return PoisonedAttention(args, on_death)


class PoisonedGroup(ThreadWorkerGroup):
    """Threads; ``kill`` is called with the group by the worker that runs a poisonous step."""

    def __init__(self, kill: Callable[[ThreadWorkerGroup], None]) -> None:
        group = self

        class Attention(PoisonedAttention):
            def kill(self) -> None:
                kill(group)

        super().__init__(by_role={"attention": Attention})


def raise_poison(group: ThreadWorkerGroup) -> None:
    """The worker cannot go on."""
    raise RuntimeError("poison")


def stop_an_expert_worker(group: ThreadWorkerGroup) -> None:
    """Another worker dies: the first expert worker of the start that lives.

    Never one that takes the place of another: it may not be in the step yet.
    """
    name = min(n for n in group.workers if n.startswith("expert-") and "." not in n)
    group.workers.pop(name).stop()
