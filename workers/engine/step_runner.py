"""Plans, runs, samples and commits the steps of one engine.

A step changes sequences only after the model has run to its last layer and the tokens are sampled.
If a peer is lost earlier, no sequence has changed and the step can run again with the same result.

On a GPU, the host works ahead: it plans and launches a step before it reads the tokens of the step
before, which the device still computes.

    host     launch 1   launch 2, read 1, commit 1   launch 3, read 2, commit 2   ..
    device              step 1                       step 2                       step 3

The unknown tokens stay on the device, where the next step reads them (``decode_graphs``). A row for
a sequence that the unknown token ends is computed in vain, and dropped. At most the tokens of one
step are unknown. The host works ahead only from one captured step of decodes to the next, if the
steps compute nothing except tokens from unprocessed logits; else it first commits the step.

Source: overlapped scheduling of SGLang 0.4, asynchronous scheduling of vLLM 0.11.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from workers.engine.batch import next_tokens
from workers.engine.decode_graphs import DecodeGraphs
from workers.engine.engine_requests import EngineRequests
from workers.engine.engine_stats import EngineStats
from workers.engine.expert_load import LoadCounter
from workers.engine.kv_memory import KvMemory
from workers.engine.model_runner import ModelRunner
from workers.engine.step_result import StepResult
from workers.engine.step_sampler import StepSampler, StepTokens
from workers.requests.sequence import NOT_FINITE
from workers.requests.step_header import StepHeader
from workers.scheduling.scheduler import Scheduler
from workers.scheduling.step_intent import StepIntent
from workers.scheduling.step_plan import RowsWanted, StepPlan
from workers.speculation.speculator import Speculator


@dataclass(frozen=True, slots=True)
class _UnreadStep:
    """A step whose tokens the host has not read, as the device may still compute it."""

    epoch: int
    """Placement epoch of the step."""
    plan: StepPlan
    read: Callable[[], StepResult]
    """Function that returns the results; see ``StepResult.to_host_later``."""
    finish: Callable[[], bool]
    """Function that finishes the step; call it before ``read``. It returns whether the step is
    complete; see ``CapturableDispatcher.finish_later``."""


class StepRunner:
    """Runs the steps of one attention rank, at most one of them ahead of the commits."""

    def __init__(
        self,
        *,
        scheduler: Scheduler,
        model: ModelRunner,
        sampler: StepSampler,
        requests: EngineRequests,
        memory: KvMemory,
        load: LoadCounter,
        stats: EngineStats,
        speculator: Speculator | None,
        has_predictor: bool,
        rank: int,
        clock: Callable[[], float],
    ) -> None:
        self.model = model
        self.sampler = sampler
        self._scheduler = scheduler
        self._requests = requests
        self._memory = memory
        self._load = load
        self._stats = stats
        self._speculator = speculator
        self._has_predictor = has_predictor
        self._rank = rank
        self._clock = clock
        self._unread: _UnreadStep | None = None
        """The latest step, if the host has not read its tokens."""
        self.has_ended = True
        """Whether a step has ended in the latest ``run``: its own step, or the step before."""
        self.intent = StepIntent()
        """Rows that this rank wanted to run when it last made a proposal to the leader."""

    @property
    def is_unread(self) -> bool:
        """Whether the host has not read the latest step yet."""
        return self._unread is not None

    def rows_wanted(self) -> RowsWanted:
        """Return the rows that this rank could run in the next step, to propose to the leader."""
        requests, isolation = self._requests, self._requests.isolation
        if isolation.is_waiting:
            return RowsWanted()
        restriction = requests.restriction(isolation.alone)
        self.intent = self._scheduler.intent(restriction)
        num_ahead = self._num_ahead()
        if self._unread is not None and not num_ahead:
            self.settle()
            self.intent = self._scheduler.intent(restriction)
        wanted = self.intent.wanted
        rows = replace(
            wanted,
            decode_rows=num_ahead or wanted.decode_rows,
            edge_share=self.model.dispatcher.edge_share,
        )
        if not requests.traced:
            return rows
        return replace(rows, parents=requests.traced.parents(self.intent.sequences))

    def _num_ahead(self) -> int:
        """Number of rows of a step after the unread step, by ``intent``; 0 if the unread step must
        be committed first, or is None."""
        if self._unread is None:
            return 0
        decoding, *others = self.intent.groups
        if self.intent.wanted.prefill_rows or self.intent.left_out_tenants or any(others):
            return 0
        if len(decoding) != len(self._unread.plan.running.rows):
            return 0
        return len(self._scheduler.ahead.continuing(self._unread.plan))

    def run(self, header: StepHeader) -> None:
        """Run the rows that the header grants this rank. Commits them, or the unread step.

        A rank with fewer rows than granted, or none, still takes part in all exchanges with the
        experts. Raises ``TransportError`` if the step fails; then no sequence has a new token.
        """
        begin = 0.0 if self._speculator is None else self._clock()
        plan = self._plan_ahead(header)
        self.has_ended = is_ahead = plan is not None
        if plan is None:
            self.settle()
            plan = self._plan(header)
        try:
            result = self._launch(header, plan, is_ahead)
            if result is not None and (is_ahead or self._may_be_late(header, plan, result)):
                self._run_late(header, plan, result)
                return
            self.has_ended = True
            tokens = None if result is None else self.sampler.sample(plan, result)
            if self._has_predictor and header.edge_rows(self._rank, 0):
                result = self._predict(plan, result, tokens)
            is_complete = self.model.dispatcher.end_step()
        except BaseException:
            if self._unread is None or self._unread.plan is not plan:
                self._abandon(plan)
            self._abandon_unread()  # last, as its blocks come before those of ``plan``
            raise
        if not is_complete:
            self._undo(plan)
            self._stats.count("steps_repeated_total")
        elif result is not None and tokens is not None:
            self._commit(header.epoch, plan, result, tokens)
            if self._speculator is not None and not header.prefill_rows:
                elsewhere = header.num_decodes - header.grant(self._rank).num_decodes
                took_s = self._clock() - begin
                self._speculator.observe_step(header.decode_rows, elsewhere, took_s)

    def _launch(self, header: StepHeader, plan: StepPlan, is_ahead: bool) -> StepResult | None:
        try:
            self.sampler.prepare(plan)
            return self.model.run(header, plan, is_ahead=is_ahead)
        finally:  # before a commit, with which requests end
            self._note_dispatch(plan)
            if header.parents:
                sequences = (rows.sequence for rows in plan.rows)
                self._requests.traced.count_step(header, self._rank, sequences)

    def _run_late(self, header: StepHeader, plan: StepPlan, result: StepResult) -> None:
        """Commit the step before a launched step, and leave this one unread if possible."""
        read, finish = result.to_host_later(), self._graphs.dispatcher.finish_later()
        launched = _UnreadStep(header.epoch, plan, read, finish)
        before = self._unread
        if before is not None and not self._commit_unread(before, is_followed=True):
            launched.finish()  # in vain: it has read a token of the incomplete step
            self._undo(plan)
            self._undo_unread()
            return
        self._unread = launched
        if self._may_stay_unread(plan):
            return
        if not self._commit_unread(launched):
            self._undo_unread()
        self.has_ended = True

    @torch.inference_mode()
    def settle(self) -> None:
        """Commit the step that the host has not read, after a wait for its end.

        No effect without such a step. Raises ``TransportError`` if its messages are lost; then no
        sequence has a new token.
        """
        if self._unread is not None:
            try:
                if not self._commit_unread(self._unread):
                    self._undo_unread()
            except BaseException:
                self._abandon_unread()
                raise

    # Plans

    def _plan(self, header: StepHeader) -> StepPlan:
        requests, isolation = self._requests, self._requests.isolation
        # Since the proposal, requests may have been paused or become suspects.
        restriction = requests.restriction(isolation.alone if header.is_alone else None)
        self.intent = self.intent.with_restriction(restriction)
        return self._scheduler.plan(self.intent, header.grant(self._rank))

    def _plan_ahead(self, header: StepHeader) -> StepPlan | None:
        """Plan the step after the unread step; None if the unread step must be committed first."""
        unread, grant = self._unread, header.grant(self._rank)
        if unread is None or header.prefill_rows or header.is_alone:
            return None
        if not self._requests.may_all_run or not self._graphs.is_captured(header):
            return None
        return self._scheduler.ahead.plan(unread.plan, grant.decode_rows)

    def _may_be_late(self, header: StepHeader, plan: StepPlan, result: StepResult) -> bool:
        """Whether the host may read a step's tokens after the launch of another step."""
        if result.drawn is None or self._speculator is not None or header.is_alone:
            return False
        is_allowed = self._graphs.dispatcher.allows_ahead and self._requests.may_all_run
        return is_allowed and all(self.sampler.is_drawn_only(r.sequence) for r in plan.rows)

    def _may_stay_unread(self, plan: StepPlan) -> bool:
        """Whether another step may follow a late one, or no sequence waits for its tokens."""
        if not self._graphs.dispatcher.allows_ahead or not self._requests.may_all_run:
            return False
        return bool(self._scheduler.ahead.continuing(plan)) or not plan.running.rows

    @property
    def _graphs(self) -> DecodeGraphs:
        graphs = self.model.graphs
        assert graphs is not None, "the step is captured"
        return graphs

    # Ends of a step

    def _commit_unread(self, unread: _UnreadStep, *, is_followed: bool = False) -> bool:
        """Commit a step after a wait for its end; without effect, return False if the step is not
        complete. ``is_followed``: another step was launched."""
        if not unread.finish():
            return False
        result, plan = unread.read(), unread.plan.running
        if is_followed:
            self._graphs.dispatcher.follow_step()
        if not plan.rows:
            self._unread = None
            return True
        if len(plan.rows) < len(unread.plan.rows):
            known = {rows.sequence for rows in plan.rows}
            every = enumerate(unread.plan.rows)
            result = result.select([i for i, rows in every if rows.sequence in known])
        tokens = self.sampler.sample(plan, result)
        self._unread = None
        self._commit(unread.epoch, plan, result, tokens, is_late=True)
        return True

    def _undo_unread(self) -> None:
        """Undo the unread step, which must run again."""
        unread, self._unread = self._unread, None
        assert unread is not None, "a step is unread"
        self._undo(unread.plan)
        self._stats.count("steps_repeated_total")

    def _abandon_unread(self) -> None:
        unread, self._unread = self._unread, None
        if unread is not None:
            self._abandon(unread.plan)

    def _abandon(self, plan: StepPlan) -> None:
        """Undo a plan whose step failed."""
        request_ids = plan.running.request_ids  # before admitted sequences wait again
        self._undo(plan)
        self._requests.isolation.record_abandoned(request_ids)
        self._stats.count("steps_abandoned_total")

    def _undo(self, plan: StepPlan) -> None:
        """Undo a plan: all sequences are as before the step."""
        plan = plan.running
        self._memory.clear_planned(plan)
        self._scheduler.abandon(plan)

    def _commit(
        self,
        epoch: int,
        plan: StepPlan,
        result: StepResult,
        tokens: StepTokens,
        *,
        is_late: bool = False,
    ) -> None:
        """Add a step's tokens to the sequences, end complete sequences, and queue the outputs."""
        now = self._clock()
        broken = [s for s, failure in tokens.failed.items() if failure is NOT_FINITE]
        dirty = self._memory.forget(broken)
        new = {
            sequence: tuple([one.token for one in drawn])  # faster than a generator
            for sequence, drawn in tokens.drawn.items()
            if sequence not in tokens.candidates
        }
        self._memory.clear_rejected(tokens.broken, new)
        endings = self._scheduler.commit(plan, new, tokens.failed.keys())
        self._memory.clear_free(dirty)
        self._load.add(epoch, plan.num_rows, result.routed, is_late=is_late)
        self._requests.isolation.commit(plan.request_ids)
        self._stats.count_step(plan.num_rows)
        self._stats.count("generation_tokens_total", sum(map(len, new.values())))
        if self._speculator is not None:
            for planned in plan.rows:
                if (own := new.get(planned.sequence)) is not None:
                    self._speculator.commit(planned.sequence, planned.drafts, own)
            for sequence, token in tokens.predicted.items():
                self._speculator.note_prediction(sequence, token)
        for sequence, entries in tokens.scored.items():
            sequence.prompt_logprobs += entries
        for sequence, rows_found in tokens.inspected.items():
            self.sampler.inspector.add(sequence, rows_found)
        self._requests.emit_step(tokens, endings, now)

    def _note_dispatch(self, plan: StepPlan) -> None:
        for sequence in self._scheduler.preemption.take_preempted():
            sequence.note_preemption(self._clock())
        when = self.model.first_dispatch
        if when is not None:
            for planned in plan.rows:
                planned.sequence.note_dispatch(when)

    def _predict(
        self, plan: StepPlan, result: StepResult | None, tokens: StepTokens | None
    ) -> StepResult | None:
        """Run the prediction layer on all rows of a step; return ``result`` with its experts."""
        drawn = {} if tokens is None else tokens.drawn
        ids = {s: [one.token for one in tokens_of] for s, tokens_of in drawn.items()}
        first_row = () if result is None else result.first_row
        predicted = self.model.predict(result, next_tokens(plan, first_row, ids))
        if predicted is None or result is None or tokens is None:
            return result
        speculator = self._speculator
        newest = {s: new for s, new in ids.items() if speculator and speculator.wants_prediction(s)}
        tokens.predicted.update(self.sampler.predict(plan, result, predicted.hidden, newest))
        return replace(result, routed=predicted.routed)
