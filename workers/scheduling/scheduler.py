"""The scheduler: continuous batching with chunked prefill. Pure, no torch.

The scheduler first makes an intent, whose row numbers go to the leader, then a plan with the rows
that the step header grants. A plan is either committed (the model ran to its last layer) or
abandoned (a peer was lost). Only a commit changes outputs of sequences. Computed rows also change
in a preemption during planning, which costs a recomputation but never changes a token.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from operator import attrgetter

from workers.kv.block_pool import BlockPool
from workers.kv.block_tables import BlockTables
from workers.kv.prefix_cache import PrefixCache
from workers.kv.sequence_states import SequenceStates
from workers.kv.state_slots import StateSlots
from workers.requests.request import FinishReason
from workers.requests.sequence import Ending, SequenceState, SequenceStatus
from workers.requests.step_header import Grant
from workers.scheduling.admission import SequenceAdmission
from workers.scheduling.block_manager import BlockManager
from workers.scheduling.draft_budget import DraftBudget
from workers.scheduling.fairness import ServedTokens
from workers.scheduling.kv_waits import KvWaits
from workers.scheduling.preemption import Preemption
from workers.scheduling.queues import SequenceQueues
from workers.scheduling.seat_reserve import SeatReserve
from workers.scheduling.short_steps import ShortSteps
from workers.scheduling.step_intent import Restriction, StepIntent
from workers.scheduling.step_plan import PlannedRows, RowsWanted, StepBudget, StepPlan
from workers.scheduling.steps_ahead import StepsAhead
from workers.scheduling.stop_conditions import StopConditions
from workers.speculation.speculator import Speculator

_UNRESTRICTED = Restriction()


class Scheduler:
    """Plans steps: decodes first, then prompts in turn, within the granted rows.

    ``SequenceAdmission`` decides which waiting sequences may run, ``Preemption`` which running
    sequences must wait, ``ShortSteps`` which decodes a step leaves out, ``DraftBudget`` how many
    drafts run. At admission a sequence gets KV blocks for all its tokens, so only decodes can later
    run short of blocks.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        eos_token_ids: Iterable[int],
        enable_prefix_caching: bool = True,
        length_matters_above: int | None = None,
        states: StateSlots | None = None,
        speculator: Speculator | None = None,
        max_draft_rows: int = 0,
    ) -> None:
        """``length_matters_above``: see ``ModelConfig.length_matters_above``.

        ``states``: state slots of a model with recurrent states. ``speculator`` proposes draft
        tokens; up to ``max_draft_rows`` drafts run in addition to ``max_num_seqs`` decode rows.
        """
        self.prefixes = PrefixCache(
            pool=pool,
            block_size=block_size,
            is_enabled=enable_prefix_caching,
            length_matters_above=length_matters_above,
            states=states,
        )
        """Cache that finds the KV blocks of prefixes. Other modules read its counters."""
        self.tables = BlockTables(max_num_seqs, -(-max_model_len // block_size))
        """Block tables of running sequences, by ``SequenceState.seat``."""
        self.kv_waits = KvWaits()
        """Waiting requests that may start, or wait for, a transfer of KV blocks."""
        self._served = ServedTokens()
        self.queues = SequenceQueues(self._served)
        """The waiting and running sequences, which other modules only read."""
        self._budget = budget = StepBudget(
            max_num_seqs=max_num_seqs,
            max_rows=max_num_batched_tokens,
            max_decode_rows=min(max_num_seqs + max_draft_rows, max_num_batched_tokens),
        )
        kept = None if states is None else SequenceStates(states, self.prefixes)
        self._blocks = BlockManager(pool, self.tables, self.prefixes, kept, max_model_len)
        self._seats = SeatReserve(max_num_seqs)
        own = (self.queues, self._blocks, budget)
        self.admission = SequenceAdmission(*own, kv_waits=self.kv_waits, seats=self._seats)
        """Policy that admits waiting sequences. Other modules read its counters."""
        self.preemption = Preemption(*own, admission=self.admission, kv_waits=self.kv_waits)
        """Policy that preempts running sequences. Other modules read its counters."""
        self._short_steps = ShortSteps(self._seats)
        self._drafts = None if speculator is None else DraftBudget(speculator, *own[1:])
        self._stop_conditions = StopConditions(eos_token_ids, max_model_len)
        self.ahead = StepsAhead(self._blocks, self._stop_conditions)
        """Planner of steps that begin before the step before is committed."""

    # Sequences

    def add(self, sequence: SequenceState) -> None:
        """Add a new sequence to the waiting sequences, in ``SequenceState.order``."""
        self.kv_waits.queue(sequence.request.request_id)
        self._served.add(sequence)
        self._seats.note(sequence)
        self.queues.wait(sequence)

    def fork(self, parent: SequenceState, child: SequenceState) -> tuple[int, int] | None:
        """Start ``child``, a beam, between steps with the computed tokens of ``parent``.

        Returns (source, destination) of a KV block that the caller must copy at once, or None. If
        the child fits, it runs in the next step. Else it waits, and later uses cached blocks.
        """
        if not self.admission.can_fork(parent, child):
            self.add(child)
            return None
        self._served.add(child)
        self._seats.note(child)
        copied = self._blocks.fork(parent, child)
        self.queues.run(child)
        return copied

    def remove(self, sequence: SequenceState, *, has_ended: bool = True) -> None:
        """End a sequence between steps, and free its blocks. ``has_ended`` False: the request goes
        on with other beams, so its blocks are not retained for its session.
        """
        if sequence.status is SequenceStatus.FINISHED:
            return
        self.queues.remove(sequence)
        self._served.remove(sequence)
        self._seats.note(sequence)
        self._blocks.release(sequence, has_ended=has_ended)
        sequence.status = SequenceStatus.FINISHED

    def take_admissible(self, restriction: Restriction, at_most: int) -> list[SequenceState]:
        """Return one sequence for each of up to ``at_most`` waiting requests that can run soon.

        Call it between steps. If the first waiting sequence fits only after a preemption, the call
        preempts for it, so that its KV blocks can be fetched into the freed blocks. See
        ``SequenceAdmission.take_admissible``.
        """
        self.preemption.preempt_for_untried(restriction)
        return self.admission.take_admissible(restriction, at_most)

    def ending(self, sequence: SequenceState) -> Ending | None:
        """Return why the output so far ends the sequence; None if the sequence continues."""
        return self._stop_conditions.ending(sequence)

    # Steps

    def intent(self, restriction: Restriction = _UNRESTRICTED) -> StepIntent:
        """Return the rows that this worker would run in the next step if all were granted."""
        decoding, prefilling = self.queues.runnable(restriction)
        blocks, admission, max_rows = self._blocks, self.admission, self._budget.max_rows
        decodes, missing = len(decoding), sum(s.num_missing for s in prefilling)
        limit = max_rows - decodes
        ready = admission.ready_to_decode(restriction, limit)
        fitting = admission.admissible(restriction, limit - missing)
        admissible = [s for s in fitting if s not in ready]
        missing += sum(map(blocks.num_to_compute, admissible))
        first = self.preemption.next_in_need(restriction)
        if first is not None:
            missing += blocks.num_to_compute(first)
        left_out: Set[str] = frozenset()
        if restriction.solo_request is None:
            others = [*prefilling, *admissible]
            counts = self.queues.running_by_tenant
            left_out = self._short_steps.choose(counts, decoding, others, missing)
        decodes += sum(s.request.tenant not in left_out for s in ready)
        prefill_rows = min(missing, max_rows - decodes)
        if left_out:
            decodes -= sum(s.request.tenant in left_out for s in decoding)
        drafts = 0
        if self._drafts is not None and not left_out:
            drafts = self._drafts.num_wanted(decoding, decodes, prefill_rows)
        rows = RowsWanted(
            decode_rows=decodes + drafts,
            prefill_rows=prefill_rows,
            is_alone=restriction.solo_request is not None,
            draft_rows=drafts,
        )
        groups = (decoding, prefilling, ready, admissible)
        return StepIntent(restriction, rows, left_out, groups, self.queues.num_changes)

    def plan(self, intent: StepIntent, grant: Grant) -> StepPlan:
        """Choose the rows of a step within the grant, and allocate their KV blocks."""
        restriction = intent.restriction
        ready = self._admit_ready(intent, grant.decode_rows)
        admissible: list[SequenceState] = []
        if grant.prefill_rows > 0:
            self.preemption.preempt_for_next(restriction)
            # BlockManager.reserve keeps blocks free for the decodes.
            able = self.admission.admissible(restriction, grant.prefill_rows)
            admissible = [s for s in able if not self._is_left_out(s, intent)]
        decoding, prefilling = self._make_room(intent, grant.decode_rows)
        rows = self._blocks.plan_decodes(decoding, ready)
        left = min(grant.prefill_rows, self._budget.max_rows - len(rows))
        kept = (s for s in prefilling if s.status is SequenceStatus.RUNNING)
        planned = sorted((*kept, *admissible), key=attrgetter("order"))
        for sequence in self._served.in_turn(planned):
            if left > 0 and (chunk := self._prompt_rows(sequence, left)) is not None:
                rows.append(chunk)
                left -= chunk.count
        if self._drafts is not None:
            self._drafts.add(len(decoding), grant.decode_rows, rows)
        return StepPlan(rows=tuple(rows))

    def commit(
        self,
        plan: StepPlan,
        drawn: Mapping[SequenceState, Sequence[int]],
        failed: Collection[SequenceState],
    ) -> dict[SequenceState, Ending]:
        """Apply a plan that ran: append tokens, and end complete and failed sequences.

        Returns the ended sequences with reasons; their blocks are free. ``drawn``: accepted tokens
        by sequence, that is accepted drafts, then one sampled token. ``failed``: sequences that end
        without a token; their blocks of this plan do not enter the prefix cache.
        """
        endings: dict[SequenceState, Ending] = {}
        self.queues.note_commit()
        self._seats.count_step(self.queues.running)
        for planned in plan.rows:
            sequence = planned.sequence
            ending = self._commit_rows(planned, drawn.get(sequence, ()), sequence in failed)
            if ending is not None:
                endings[sequence] = ending
                self.remove(sequence)
        return endings

    def abandon(self, plan: StepPlan) -> None:
        """Undo a plan whose step failed: free its new blocks; sequences that it admitted wait."""
        for planned in plan.rows:
            self._blocks.abandon(planned)
            if planned.is_admitted:
                self.queues.remove(planned.sequence)
                self.queues.wait(planned.sequence)

    def check_integrity(
        self, others: Iterable[list[int]] = (), plan: StepPlan | None = None
    ) -> None:
        """Assert that running sequences and ``others`` (lists of blocks) hold exactly the blocks in
        use, and that the prefix cache has the right hashes of blocks; for tests.

        ``plan``: a plan that is neither committed nor abandoned yet.
        """
        planned = () if plan is None else plan.rows
        self._blocks.check_integrity(self.queues.running, others, planned)
        self.queues.check_integrity(self._served)
        for sequence in self.queues.waiting:
            assert not sequence.blocks
            assert sequence.seat is None
            assert not sequence.num_computed
            assert sequence.state is None

    def _is_left_out(self, waiting: SequenceState, intent: StepIntent) -> bool:
        return intent.leaves_out(waiting) and self.admission.would_decode(waiting)

    def _admit_ready(self, intent: StepIntent, decode_rows: int) -> list[SequenceState]:
        """Admit waiting sequences whose first row is a decode row, as far as the grant has rows."""
        candidates = self.admission.ready_to_decode(intent.restriction, self._budget.max_rows)
        ready = [s for s in candidates if not intent.leaves_out(s)]
        if ready:
            decoding, _ = self.queues.runnable(intent.restriction)
            spare = decode_rows - sum(not intent.leaves_out(s) for s in decoding)
            del ready[max(spare, 0) :]
        admitted = []
        for sequence in ready:
            if self.admission.still_fits(sequence):
                self.admission.admit(sequence)
                admitted.append(sequence)
        return admitted

    def _make_room(
        self, intent: StepIntent, decode_rows: int
    ) -> tuple[list[SequenceState], list[SequenceState]]:
        """Preempt sequences until enough blocks are free for the decode rows of the step.

        Returns the first ``decode_rows`` decoding sequences, and the sequences that do not decode.
        """
        is_short = bool(intent.left_out_tenants)
        while True:
            if intent.num_changes == self.queues.num_changes:
                decoding, prefilling = map(list, intent.groups[:2])
            else:
                decoding, prefilling = self.queues.runnable(intent.restriction)
            if is_short:
                others = [s for s in decoding if not intent.leaves_out(s)]
                is_short = decode_rows <= len(others)  # else the grant is for an older intent
                decoding = others if is_short else decoding
            del decoding[decode_rows:]
            if self._blocks.can_grow(decoding):
                self._short_steps.note(is_short)
                return decoding, prefilling
            self.preemption.preempt_last(intent.restriction)

    def _prompt_rows(self, sequence: SequenceState, limit: int) -> PlannedRows | None:
        """Plan up to ``limit`` prompt or recomputed rows of a sequence; None if it does not fit."""
        is_admitted = sequence.status is SequenceStatus.WAITING
        if is_admitted and not self.admission.still_fits(sequence):
            return None
        num_new = self.admission.admit(sequence) if is_admitted else 0
        count, first = min(limit, sequence.num_missing), sequence.num_computed
        states = self._blocks.move(sequence, first, count)
        return PlannedRows(sequence, first, count, False, num_new, is_admitted, states)

    def _commit_rows(
        self, planned: PlannedRows, tokens: Sequence[int], has_failed: bool
    ) -> Ending | None:
        """Apply the planned rows of one sequence; return why the sequence ended, or None."""
        sequence, count = planned.sequence, planned.count
        draws_token = planned.is_decode or planned.samples_token
        if sequence.num_cached_tokens is None:
            self.prefixes.count(sequence, planned.first)
        if planned.drafts:
            count += max(len(tokens) - 1, 0) - len(planned.drafts)
        sequence.num_computed += count
        self._served.charge(sequence, count)
        self._blocks.commit(planned, has_failed=has_failed)
        if has_failed:
            return Ending(reason=FinishReason.ERROR)
        if draws_token:
            for token in tokens:
                sequence.append(token)
        self._blocks.store(planned)
        return self._stop_conditions.ending(sequence) if draws_token else None
