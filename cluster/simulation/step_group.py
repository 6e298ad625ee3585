"""Attention workers that run steps together, in virtual time."""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass

from cluster.config.cluster import EngineSection
from cluster.sizing.mixed_step import RankRows, StepTimes
from cluster.sizing.roofline import StepTime
from gateway.engines.router import RoutingPolicy, WorkerLoad, pick_worker
from workers.engine.leader import decide_header
from workers.engine.micro_batches import MicroBatchRule
from workers.engine.prefill_cap import PrefillCap
from workers.engine.step_proposals import ProposalTable, StepProposal
from workers.kv.block_pool import BlockPool
from workers.requests.sequence import SequenceState
from workers.requests.step_header import StepHeader
from workers.scheduling.scheduler import Scheduler
from workers.scheduling.step_intent import Restriction
from workers.scheduling.step_plan import StepPlan

_TOKEN = 5
_NO_RESTRICTION = Restriction()


@dataclass(slots=True)
class RunningStep:
    """A step of a group."""

    plans: Sequence[StepPlan]
    """Plan of each attention worker."""
    time: StepTime
    """Time that the step takes alone."""
    num_rows: int
    ends_s: float = math.inf
    """Time of its end, once it has begun."""


class StepGroupSimulation:
    """One step group. Its workers serve requests until these end or are removed."""

    def __init__(
        self,
        times: StepTimes,
        engine: EngineSection,
        *,
        num_attention: int,
        num_kv_blocks: int,
        max_model_len: int,
        micro_batches: MicroBatchRule,
    ) -> None:
        """``num_kv_blocks``: of each attention worker."""
        self.running: RunningStep | None = None
        """The step that runs now."""
        self._times = times
        self._micro_batches = micro_batches
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
        self._ranks: dict[SequenceState, int] = {}
        self._prompts: set[SequenceState] = set()
        """Sequences without a token of this group."""
        self._computed: set[SequenceState] = set()
        """Sequences without a token of this group, with prompts that another one has computed."""
        self._num_steps = 0
        self._num_added = 0

    def add(self, sequence: SequenceState, *, is_computed: bool) -> None:
        """Send a sequence to a worker. ``is_computed``: whether its prompt, except the last token,
        takes no time."""
        length = len(sequence.request.prompt)
        route = pick_worker(self._loads, RoutingPolicy.KV, self._num_added, length)
        self._num_added += 1
        rank = int(route.load.name)
        route.load.queued_tokens += length
        self._ranks[sequence] = rank
        self._prompts.add(sequence)
        if is_computed:
            self._computed.add(sequence)
        self._schedulers[rank].add(sequence)

    def remove(self, sequence: SequenceState) -> None:
        """Remove a sequence that has a token, which continues elsewhere."""
        self._schedulers[self._ranks[sequence]].remove(sequence)
        self._forget(sequence)

    def next_step(self) -> RunningStep | None:
        """Return the next step; None if no request can have rows."""
        intents = [scheduler.intent(_NO_RESTRICTION) for scheduler in self._schedulers]
        wanted = enumerate(intent.wanted for intent in intents)
        self._proposals.put(StepProposal.of(rank, rows) for rank, rows in wanted)
        decode_rows = sum(intent.wanted.decode_rows for intent in intents)
        header = decide_header(
            self._proposals,
            generation=1,
            step=self._num_steps,
            epoch=1,
            oldest_epoch=1,
            max_prefill_rows=self._prefill_cap.rows(decode_rows, len(intents)),
            micro_batches=self._micro_batches,
        )
        if header is None:
            return None
        plans = [
            scheduler.plan(intent, header.grant(rank))
            for rank, (scheduler, intent) in enumerate(zip(self._schedulers, intents, strict=True))
        ]
        if not any(plan.rows for plan in plans):
            return None
        return self._timed(header, plans)

    def _timed(self, header: StepHeader, plans: Sequence[StepPlan]) -> RunningStep:
        ranks = [work_of(plan, self._computed) for plan in plans if plan.rows]
        every = (rows for plan in plans for rows in plan.rows)
        num_free = sum(rows.count for rows in every if rows.sequence in self._computed)
        has_prefill, number = header.prefill_rows > num_free, header.num_micro_batches
        if num_free:
            number = self._micro_batches.choose(max(r.num_rows for r in ranks), has_prefill)
        time = self._times.step(ranks, has_prefill=has_prefill, num_micro_batches=number)
        self._prefill_cap.observe(header.decode_rows, header.prefill_rows, time.step_s)
        self._num_steps += 1
        return RunningStep(plans, time, sum(rank.num_rows for rank in ranks))

    def begin(self, step: RunningStep, ends_s: float) -> None:
        self.running, step.ends_s = step, ends_s

    def end(self) -> tuple[list[SequenceState], list[SequenceState]]:
        """End the running step; return the sequences that have a new token, and those that have
        ended."""
        assert self.running is not None
        all_drawing, all_endings = list[SequenceState](), list[SequenceState]()
        for scheduler, plan in zip(self._schedulers, self.running.plans, strict=True):
            drawing = [rows.sequence for rows in plan.rows if rows.samples_token]
            endings = scheduler.commit(plan, dict.fromkeys(drawing, (_TOKEN,)), ())
            for sequence in drawing:
                self._count_token(sequence)
            for sequence in endings:
                self._forget(sequence)
            all_drawing += drawing
            all_endings += endings
        self.running = None
        return all_drawing, all_endings

    def _count_token(self, sequence: SequenceState) -> None:
        if sequence in self._prompts:
            self._prompts.remove(sequence)
            self._computed.discard(sequence)
            load = self._loads[self._ranks[sequence]]
            load.queued_tokens -= len(sequence.request.prompt)
            load.num_decoding += 1

    def _forget(self, sequence: SequenceState) -> None:
        self._loads[self._ranks.pop(sequence)].num_decoding -= 1


def work_of(plan: StepPlan, computed: Set[SequenceState] = frozenset()) -> RankRows:
    """Return the work of a plan that has rows. Of the rows of ``computed`` sequences only the last
    takes time."""
    return RankRows(
        num_rows=sum(1 if rows.sequence in computed else rows.count for rows in plan.rows),
        num_drawn=sum(rows.samples_token for rows in plan.rows),
        context_tokens=sum(rows.first + rows.count for rows in plan.rows),
    )
