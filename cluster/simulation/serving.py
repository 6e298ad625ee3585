"""Serves a workload in virtual time: when each token of each request comes.

Scheduling is the product's own code: the gateway's choice of a worker, the scheduler of each
attention worker with its KV blocks, and the leader's decision on each step. Only the time of a step
is computed (``cluster.sizing.mixed_step``). All ranks of a step end together, and requests that
arrive meanwhile have rows from the next step on.

With step groups, each group runs its own steps (``cluster.simulation.step_group``). A request is
handed over after its first token, with its blocks. If the groups share expert workers, their steps
take longer (``cluster.sizing.group_steps``); the waits of decode steps are drawn at random.

Left out: prefixes shared by prompts, drafts, limits of the gateway, the time of gateways and of the
messages between hosts outside the exchange with experts, faults and rebalancing; with step groups
also the limits of steps in which a decode worker computes a preempted request again, and requests
that decode at a prefill worker while no decode worker has enough KV blocks.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from cluster.config.cluster import EngineSection
from cluster.simulation.step_group import RunningStep, StepGroupSimulation
from cluster.sizing.group_steps import GroupSteps
from cluster.sizing.mixed_step import StepTimes
from cluster.sizing.roofline import StepTime
from cluster.workload.arrivals import Arrival
from cluster.workload.tally import CompletedRequest, Tally
from workers.engine.micro_batches import MicroBatchRule
from workers.requests.request import Request, SamplingParams
from workers.requests.sequence import SequenceState

_TOKEN = 5
_MAX_EMPTY = 100
"""Steps without rows in a row, for example after preemptions; more are an endless loop."""


@dataclass(slots=True)
class StepShares:
    """Where the time of the steps of a simulation went, in seconds."""

    num_steps: int = 0
    busy_s: float = 0.0
    """Time of all steps. The rest of the duration, no request had rows."""
    attention_s: float = 0.0
    experts_s: float = 0.0
    exchange_s: float = 0.0
    host_s: float = 0.0
    num_rows: int = 0
    """Rows of all steps and workers."""

    def add(self, step: StepTime, num_rows: int, more_s: float) -> None:
        """Add a step, which took ``more_s`` longer because of another group."""
        self.num_steps += 1
        self.num_rows += num_rows
        self.busy_s += step.step_s + more_s
        self.host_s += step.host_s
        for part in ("attention_s", "experts_s", "exchange_s"):
            seconds = step.num_micro_batches * getattr(step, part)
            setattr(self, part, getattr(self, part) + seconds)


@dataclass(slots=True, eq=False)
class _Served:
    """A request at an attention worker of a step group."""

    arrival: Arrival
    group: int
    sent_s: float
    tokens_s: list[float] = field(default_factory=list)
    """Times of the tokens, after ``sent_s``."""


class ServingSimulation:
    """One cluster, from its start without requests on."""

    def __init__(
        self,
        times: StepTimes,
        engine: EngineSection,
        *,
        num_attention: int,
        num_kv_blocks: int,
        max_model_len: int,
        micro_batches: MicroBatchRule,
        max_concurrency: int | None = None,
        entry_s: float = 0.0,
        groups: GroupSteps | None = None,
        seed: int = 0,
    ) -> None:
        """``num_kv_blocks``: of each attention worker. ``max_concurrency``: of requests.

        ``entry_s``: seconds from a client to a worker and back, in addition to steps. ``groups``,
        if not None, replaces ``times`` and ``num_attention``; ``seed`` is of the waits for experts
        that they share.
        """
        self.shares = StepShares()
        self.now_s = 0.0
        self._entry_s = entry_s
        self._max_in_flight = max_concurrency or math.inf
        self._steps = groups
        self._draw = np.random.default_rng(seed)
        sizes = [(times, engine, num_attention)]
        if groups is not None:
            # Prompts of the decode group take no time: their blocks are there.
            free = replace(engine, max_num_batched_tokens=1 << 30, itl_target_ms=None)
            sizes = [
                (groups.prefill, engine, groups.sizes.num_prefill),
                (groups.decode, free, groups.sizes.num_decode),
            ]
        self._groups = [
            StepGroupSimulation(
                own_times,
                own_engine,
                num_attention=number,
                num_kv_blocks=num_kv_blocks,
                max_model_len=max_model_len,
                micro_batches=micro_batches,
            )
            for own_times, own_engine, number in sizes
        ]
        self._served: dict[SequenceState, _Served] = {}
        self._num_arrived = 0
        self._max_tokens = min(max_model_len, num_kv_blocks * engine.block_size_tokens)

    def run(self, arrivals: Sequence[Arrival], tally: Tally, tick: Callable[[], None]) -> None:
        """Serve all ``arrivals``, in the order of time, and add them to ``tally``.

        ``tick`` is called after each step. A request that no worker can hold fails.
        """
        waiting, num_empty = deque(arrivals), 0
        while waiting or self._served:
            self._take(waiting, tally)
            for index, group in enumerate(self._groups):
                if group.running is None and (step := group.next_step()) is not None:
                    self._begin(index, step)
            ends = [group.running.ends_s for group in self._groups if group.running is not None]
            if ends:
                num_empty = 0
                self._pass_time(min(ends), waiting)
                self._end_steps(tally)
            else:
                num_empty += bool(self._served)
                assert num_empty < _MAX_EMPTY, "requests are served, but none gets rows"
                if waiting:
                    self.now_s = max(self.now_s, waiting[0].due_s + self._entry_s)
            tick()

    def _take(self, waiting: deque[Arrival], tally: Tally) -> None:
        """Route the requests that have arrived to the workers."""
        while waiting and waiting[0].due_s + self._entry_s <= self.now_s:
            if len(self._served) >= self._max_in_flight:
                return
            arrival, number = waiting.popleft(), self._num_arrived
            self._num_arrived += 1
            is_late = len(self._served) + 1 >= self._max_in_flight
            sent_s = self.now_s if is_late else arrival.due_s
            tally.begin(sent_s - arrival.due_s)
            if arrival.input_len + arrival.output_len > self._max_tokens:
                tally.fail("too_long")
                continue
            self._send(number, _Served(arrival, 0, sent_s))

    def _send(self, number: int, served: _Served) -> None:
        """Send a request to a worker of its group."""
        arrival, done = served.arrival, len(served.tokens_s)
        request = Request(
            request_id=str(number),
            prompt=(_TOKEN,) * (arrival.input_len + done),
            params=SamplingParams(max_tokens=arrival.output_len - done, ignore_eos=True),
        )
        sequence = SequenceState(request, 0, number, math.inf)
        self._groups[served.group].add(sequence, is_computed=done > 0)
        self._served[sequence] = served

    def _begin(self, index: int, step: RunningStep) -> None:
        """Begin a step of a group, which takes longer if another one uses the same experts."""
        more_s = 0.0
        steps, other = self._steps, self._groups[-1 - index].running
        if steps is not None and other is not None and steps.is_shared:
            if index == 1:
                more_s = self._wait_s(steps, step.time, other.time)
            else:
                more_s = steps.prefill_s(step.time, other.time) - step.time.step_s
        self._groups[index].begin(step, self.now_s + step.time.step_s + more_s)
        self.shares.add(step.time, step.num_rows, more_s)

    def _wait_s(self, steps: GroupSteps, decode: StepTime, prefill: StepTime) -> float:
        """Return how long a decode step waits for parts of the prompts of a prefill step."""
        number = self._draw.binomial(steps.num_exchanges, steps.chance(decode, prefill))
        mean_s = steps.late_s(decode, prefill)
        least_s = max(0.0, 2 * mean_s - steps.part_s(prefill))
        return float(self._draw.uniform(least_s, 2 * mean_s - least_s, number).sum())

    def _pass_time(self, end_s: float, waiting: deque[Arrival]) -> None:
        """Advance to the end of a step, or to an arrival before it that begins one."""
        is_idle = self._groups[0].running is None and len(self._served) < self._max_in_flight
        due_s = waiting[0].due_s + self._entry_s if waiting and is_idle else math.inf
        self.now_s = max(self.now_s, min(end_s, due_s))

    def _end_steps(self, tally: Tally) -> None:
        for group in self._groups:
            if group.running is not None and group.running.ends_s <= self.now_s:
                drawing, endings = group.end()
                for served in map(self._served.__getitem__, drawing):
                    served.tokens_s.append(self.now_s - served.sent_s)
                for sequence in endings:
                    self._complete(self._served.pop(sequence), tally)
                if group is not self._groups[-1]:
                    for sequence in drawing:
                        self._hand_over(sequence)

    def _complete(self, served: _Served, tally: Tally) -> None:
        lengths = served.arrival.input_len, len(served.tokens_s)
        tally.take(CompletedRequest(served.tokens_s, served.tokens_s[-1], *lengths))

    def _hand_over(self, sequence: SequenceState) -> None:
        """Send a request that has its first token to the decode group."""
        served = self._served.pop(sequence, None)
        if served is None:
            return
        self._groups[served.group].remove(sequence)
        served.group += 1
        self._send(int(sequence.request.request_id), served)
