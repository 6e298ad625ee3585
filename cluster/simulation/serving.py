"""Serves a workload in virtual time: when each token of each request comes.

Scheduling is the product's own code: the gateway's choice of a worker, the scheduler of each
attention worker with its KV blocks, and the leader's decision on each step. Only the time of a step
is computed (``cluster.sizing.mixed_step``). All ranks of a step end together, and requests that
arrive meanwhile have rows from the next step on.

Left out: prefixes shared by prompts, drafts, limits of the gateway, the time of gateways and of the
messages between hosts outside the exchange with experts, faults and rebalancing.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cluster.config.cluster import EngineSection
from cluster.sizing.mixed_step import RankRows, StepTimes
from cluster.sizing.roofline import StepTime
from cluster.workload.arrivals import Arrival
from cluster.workload.tally import CompletedRequest, Tally
from gateway.engines.router import RoutingPolicy, WorkerLoad, pick_worker
from workers.engine.leader import decide_header
from workers.engine.micro_batches import MicroBatchRule
from workers.engine.prefill_cap import PrefillCap
from workers.engine.step_proposals import ProposalTable, StepProposal
from workers.kv.block_pool import BlockPool
from workers.requests.request import Request, SamplingParams
from workers.requests.sequence import SequenceState
from workers.requests.step_header import StepHeader
from workers.scheduling.scheduler import Scheduler
from workers.scheduling.step_intent import Restriction
from workers.scheduling.step_plan import StepPlan

_TOKEN = 5
_MAX_EMPTY = 100
"""Steps without rows in a row, for example after preemptions; more are an endless loop."""
_NO_RESTRICTION = Restriction()


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

    def add(self, step: StepTime, num_rows: int) -> None:
        """Add a step."""
        self.num_steps += 1
        self.num_rows += num_rows
        self.busy_s += step.step_s
        self.host_s += step.host_s
        for part in ("attention_s", "experts_s", "exchange_s"):
            seconds = step.num_micro_batches * getattr(step, part)
            setattr(self, part, getattr(self, part) + seconds)


@dataclass(slots=True, eq=False)
class _Served:
    """A request at an attention worker."""

    arrival: Arrival
    rank: int
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
    ) -> None:
        """``num_kv_blocks``: of each attention worker. ``max_concurrency``: of requests.

        ``entry_s``: seconds from a client to a worker and back, in addition to steps.
        """
        self.shares = StepShares()
        self.now_s = 0.0
        self._times = times
        self._micro_batches = micro_batches
        self._entry_s = entry_s
        self._max_in_flight = max_concurrency or math.inf
        self._prefill_cap = PrefillCap.of(engine)
        self._proposals = ProposalTable(range(num_attention))
        self._loads = [WorkerLoad(name=str(rank)) for rank in range(num_attention)]
        self._schedulers = [
            Scheduler(
                BlockPool(num_kv_blocks),
                block_size=engine.block_size_tokens,
                max_num_seqs=engine.max_num_seqs,
                max_num_batched_tokens=engine.step_tokens,
                max_model_len=max_model_len,
                eos_token_ids=(),
                enable_prefix_caching=False,
            )
            for _ in range(num_attention)
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
            if self._step(tally):
                num_empty = 0
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
            route = pick_worker(self._loads, RoutingPolicy.KV, number, arrival.input_len)
            route.load.queued_tokens += arrival.input_len
            request = Request(
                request_id=str(number),
                prompt=(_TOKEN,) * arrival.input_len,
                params=SamplingParams(max_tokens=arrival.output_len, ignore_eos=True),
            )
            sequence = SequenceState(request, 0, number, math.inf)
            rank = int(route.load.name)
            self._served[sequence] = _Served(arrival, rank, sent_s)
            self._schedulers[rank].add(sequence)

    def _step(self, tally: Tally) -> bool:
        """Run the next step; return False if no request can have rows."""
        intents = [scheduler.intent(_NO_RESTRICTION) for scheduler in self._schedulers]
        wanted = enumerate(intent.wanted for intent in intents)
        self._proposals.put(StepProposal.of(rank, rows) for rank, rows in wanted)
        decode_rows = sum(intent.wanted.decode_rows for intent in intents)
        header = decide_header(
            self._proposals,
            generation=1,
            step=self.shares.num_steps,
            epoch=1,
            oldest_epoch=1,
            max_prefill_rows=self._prefill_cap.rows(decode_rows, len(intents)),
            micro_batches=self._micro_batches,
        )
        if header is None:
            return False
        plans = [
            scheduler.plan(intent, header.grant(rank))
            for rank, (scheduler, intent) in enumerate(zip(self._schedulers, intents, strict=True))
        ]
        if not any(plan.rows for plan in plans):
            return False
        self._pass_time(header, plans)
        for scheduler, plan in zip(self._schedulers, plans, strict=True):
            self._commit(scheduler, plan, tally)
        return True

    def _pass_time(self, header: StepHeader, plans: Sequence[StepPlan]) -> None:
        ranks = [work_of(plan) for plan in plans if plan.rows]
        step = self._times.step(
            ranks,
            has_prefill=bool(header.prefill_rows),
            num_micro_batches=header.num_micro_batches,
        )
        self._prefill_cap.observe(header.decode_rows, header.prefill_rows, step.step_s)
        self.shares.add(step, sum(rank.num_rows for rank in ranks))
        self.now_s += step.step_s

    def _commit(self, scheduler: Scheduler, plan: StepPlan, tally: Tally) -> None:
        """End a step on one worker: its sequences have new tokens."""
        drawing = [rows.sequence for rows in plan.rows if rows.samples_token]
        endings = scheduler.commit(plan, dict.fromkeys(drawing, (_TOKEN,)), ())
        for sequence in drawing:
            served = self._served[sequence]
            load = self._loads[served.rank]
            if not served.tokens_s:
                load.queued_tokens -= served.arrival.input_len
                load.num_decoding += 1
            served.tokens_s.append(self.now_s - served.sent_s)
        for sequence in endings:
            served = self._served.pop(sequence)
            self._loads[served.rank].num_decoding -= 1
            lengths = served.arrival.input_len, len(served.tokens_s)
            tally.take(CompletedRequest(served.tokens_s, served.tokens_s[-1], *lengths))


def work_of(plan: StepPlan) -> RankRows:
    """Return the work of a plan that has rows."""
    return RankRows(
        num_rows=sum(rows.count for rows in plan.rows),
        num_drawn=sum(rows.samples_token for rows in plan.rows),
        context_tokens=sum(rows.first + rows.count for rows in plan.rows),
    )
