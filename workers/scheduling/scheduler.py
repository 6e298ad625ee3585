"""Which rows run in the next step: continuous batching with chunked prefill. Pure, no torch.

A plan is made from what the step header grants, and then either committed (the model ran to its
last layer) or abandoned (a peer was lost): only a commit changes what sequences have computed and
produced. Preemption is the exception: planning preempts at once, which costs a recomputation but
never changes a token.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from operator import attrgetter

from msgspec.structs import replace

from workers.kv.block_pool import BlockPool
from workers.kv.block_tables import BlockTables
from workers.kv.prefix_cache import PrefixCache
from workers.kv.sequence_states import SequenceStates
from workers.kv.state_slots import StateMove, StateSlots
from workers.requests.request import FinishReason, Request
from workers.requests.sequence import Ending, SequenceState, SequenceStatus
from workers.scheduling.fairness import ServedTokens
from workers.scheduling.kv_waits import KvWaits
from workers.scheduling.seat_reserve import RESERVED_ONE_IN, SeatReserve
from workers.scheduling.step_plan import PlannedRows, RowsWanted, StepPlan
from workers.speculation.speculator import Speculator

_BLOCKS_AHEAD = 2
"""Free blocks for each running sequence below which one may be preempted soon: it takes so many
blocks of steps until they are gone."""

_STEPS_AHEAD = 8
"""Full steps of prompts from which blocks of other places may be on their way at once."""


class Scheduler:
    """Sequences, their blocks, and the plan of a step.

    Tenants take turns (``fairness``). Of one tenant lower priority values go first, then sequences
    with output from another worker, then earlier arrivals. At admission a sequence gets the blocks
    of all tokens it has, so only decodes can run short of blocks later; blocks that the prefix
    cache knows are computed already. When blocks run short, the last sequence of the tenant with
    the most is preempted: it waits again, without blocks, and recomputes from prompt and output
    what the cache has lost by then. So the first one always continues, and every sequence ends.

    A tenant with more than its share that has most of the rows gives way to first tokens of others:
    these run in a step without its decodes, which is short, so they do not wait for a long one.

    Admission leaves a free block for each running sequence that may still grow, so that a sequence
    is not preempted in the step after its admission. A waiting sequence that does not fit preempts
    running ones only where they are of its tenant with a lower priority, or idle, or if it must
    run alone. A beam is idle while others of its request are still to be computed: it gives way,
    lest beams of several requests hold the blocks that each of them waits for.
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

        ``states``: slots of a model with recurrent states. ``speculator`` names drafts for decodes,
        ``max_draft_rows`` of them beside ``max_num_seqs`` rows.
        """
        self._pool = pool
        self._block_size = block_size
        self._max_num_seqs = max_num_seqs
        self._max_rows = max_num_batched_tokens
        self._max_decode_rows = min(max_num_seqs + max_draft_rows, max_num_batched_tokens)
        self._speculator = speculator
        self._max_model_len = max_model_len
        self._eos = frozenset(eos_token_ids)
        self.prefixes = PrefixCache(
            pool=pool,
            block_size=block_size,
            is_enabled=enable_prefix_caching,
            length_matters_above=length_matters_above,
            states=states,
        )
        """Finds tokens that were computed before. Other modules read its counters."""
        self._states = None if states is None else SequenceStates(states, self.prefixes)
        self.tables = BlockTables(max_num_seqs, self._blocks(max_model_len))
        """The blocks of running sequences, by ``SequenceState.seat``."""
        self.kv_waits = KvWaits()
        """Waiting requests whose blocks may come from elsewhere."""
        self._served = ServedTokens()
        self._seats = SeatReserve(max_num_seqs)
        self._waiting: list[SequenceState] = []
        self._running: list[SequenceState] = []
        self.num_preemptions = 0
        self.preempted: list[SequenceState] = []
        """Sequences that were preempted for the last plan."""
        self._held: Set[str] = frozenset()
        self._alone: str | None = None
        self._giving_way: Set[str] = frozenset()  # tenants, in the next step
        self._gave_way = False  # in the last one
        self.expected: tuple[Sequence[SequenceState], ...] = ()
        """Sequences that the rows last wanted are of: those that decode, and others."""

    @property
    def running(self) -> list[SequenceState]:
        """Sequences that take part in steps, in order."""
        return list(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_deferred(self) -> int:
        """Waiting sequences that wait until the first choice of their request has its prompt."""
        return sum(map(self._waits_for_first_choice, self._waiting))

    @property
    def num_waiting_for_kv(self) -> int:
        """Waiting sequences, but for deferred ones, whose KV blocks are on their way."""
        return sum(map(self._waits_for_kv, self._waiting))

    def sequences_by_adapter(self) -> tuple[Counter[str], Counter[str]]:
        """Running and waiting sequences by adapter; any thread may call it."""
        groups = (tuple(self._running), tuple(self._waiting))
        running, waiting = (Counter(s.request.adapter for s in group) for group in groups)
        return running, waiting

    @property
    def num_waiting_tokens(self) -> int:
        """Prompt tokens of waiting sequences, counted once for all choices of a request."""
        return sum(s.prompt_length for s in self._waiting if s.first_choice is None)

    def add(self, sequence: SequenceState) -> None:
        """Queue a sequence behind those of its priority."""
        self.kv_waits.queue(sequence.request.request_id)
        self._served.enter(sequence)
        self._seats.note(sequence)
        self._enter(self._waiting, sequence, SequenceStatus.WAITING)

    def fork(self, parent: SequenceState, child: SequenceState) -> tuple[int, int] | None:
        """Between steps: ``child`` begins with what ``parent`` has computed; both know one token
        more. Returns blocks (from, to) that are to be copied now, if there is one.

        It runs beside its parent where there is room, else it waits and finds what is cached.
        """
        if not self._has_room_beside(parent, child):
            self.add(child)
            return None
        self._served.enter(child)
        self._seats.note(child)
        child.seat, child.num_computed = self.tables.take_seat(), parent.num_computed
        num_full = parent.num_computed // self._block_size
        self._extend(child, parent.blocks[:num_full])
        self._pool.share(child.blocks)
        copied = self._pool.allocate(self._blocks(parent.num_computed) - num_full)
        self._extend(child, copied)
        self.prefixes.begin(child)
        if self._states is not None:
            self._states.fork(parent, child)
        self._enter(self._running, child, SequenceStatus.RUNNING)
        return (parent.blocks[num_full], copied[0]) if copied else None

    def remove(self, sequence: SequenceState, *, has_ended: bool = True) -> None:
        """End a sequence between steps; its blocks are free at once. Not ``has_ended``: others of
        its request go on, and what the request says of its blocks is not for these.
        """
        if sequence.status is SequenceStatus.FINISHED:
            return
        here = self._running if sequence.status is SequenceStatus.RUNNING else self._waiting
        here.remove(sequence)
        self._served.leave(sequence)
        self._seats.note(sequence)
        self._release(sequence, has_ended=has_ended)
        sequence.status = SequenceStatus.FINISHED

    def ending(self, sequence: SequenceState) -> Ending | None:
        """Why the output so far ends the sequence; None if it does not."""
        params, output = sequence.params, sequence.output
        if output and len(output) >= params.min_tokens:
            if output[-1] in self._eos and not params.ignore_eos:
                return Ending(reason=FinishReason.STOP)
            if output[-1] in params.stop_token_ids:
                return Ending(reason=FinishReason.STOP, stop_token_id=output[-1])
        if sequence.grammar is not None and sequence.grammar.is_complete:
            return Ending(reason=FinishReason.STOP)
        if len(output) >= params.max_tokens or sequence.num_tokens >= self._max_model_len:
            return Ending(reason=FinishReason.LENGTH)
        return None

    def take_admissible(self, at_most: int) -> list[SequenceState]:
        """Waiting sequences that fit into the next steps, one of each request, as long as seats and
        free blocks last; each is returned once, and again if it is preempted.
        """
        if not self.kv_waits.has_unasked:
            return []
        able: dict[str, SequenceState] = {}
        for sequence in self._admissible(_STEPS_AHEAD * self._max_rows):
            able.setdefault(sequence.request.request_id, sequence)
        return [able[name] for name in self.kv_waits.take_unasked(able, at_most)]

    def restrict(self, held: Set[str] = frozenset(), alone: str | None = None) -> None:
        """From now on plan no rows of the requests ``held``, or of all but the one ``alone``."""
        self._held, self._alone = held, alone

    def wanted(self) -> RowsWanted:
        """Rows that the next step would run if all were granted."""
        decoding, prefilling = self._runnable()
        decodes, missing = len(decoding), sum(s.num_missing for s in prefilling)
        limit = self._max_rows - decodes
        ready = self._ready(limit)
        admissible = [s for s in self._admissible(limit - missing) if s not in ready]
        missing += sum(map(self._num_to_compute, admissible))
        first = self._first_in_need()
        if first is not None:
            missing += self._num_to_compute(first)
        self._giving_way = self._who_gives_way(decoding, [*prefilling, *admissible], missing)
        decodes += sum(not self._gives_way(s) for s in ready)
        prefill_rows = min(missing, self._max_rows - decodes)
        decodes -= sum(map(self._gives_way, decoding))
        drafts = self._num_drafts(decoding, decodes, prefill_rows)
        is_alone = self._alone is not None
        self.expected = decoding, prefilling, ready, admissible
        return RowsWanted(
            decode_rows=decodes + drafts,
            prefill_rows=prefill_rows,
            is_alone=is_alone,
            draft_rows=drafts,
        )

    def schedule(self, decode_rows: int, prefill_rows: int) -> StepPlan:
        """Choose rows within what was granted, and allocate their blocks."""
        self.preempted.clear()
        rows: list[PlannedRows] = []
        admissible: list[SequenceState] = []
        ready = self._admit_ready(decode_rows)
        if prefill_rows > 0:
            while (first := self._first_in_need()) is not None:
                lower = [s for s in self._running if _yields(s, first.request)]
                self._preempt(lower[-1] if self._alone is None else self._last())
            # Decodes leave them blocks: see _reserve.
            able = self._admissible(prefill_rows)
            admissible += (s for s in able if not (self._gives_way(s) and self._would_decode(s)))
        decoding, prefilling = self._make_room(decode_rows)
        self._gave_way = bool(self._giving_way)
        for sequence in decoding:
            self._plan_decode(sequence, rows, is_admitted=sequence in ready)
        left = min(prefill_rows, self._max_rows - len(rows))
        kept = (s for s in prefilling if s.status is SequenceStatus.RUNNING)
        planned = sorted((*kept, *admissible), key=attrgetter("order"))
        for sequence in self._served.in_turn(planned):
            if left > 0:
                left -= self._plan_chunk(sequence, left, rows)
        self._add_drafts(rows[: len(decoding)], decode_rows, rows)
        return StepPlan(rows=tuple(rows))

    def commit(
        self,
        plan: StepPlan,
        drawn: Mapping[SequenceState, Sequence[int]],
        failed: Collection[SequenceState],
    ) -> dict[SequenceState, Ending]:
        """The plan ran. ``drawn`` has the token of each sequence that drew one; several, if its
        drafts but for the last of them are the first of these tokens. Only the last may end it.

        Returns the sequences that ended, with the reason; their blocks are free. ``failed`` ones
        end without a token, and the prefix cache never gets what they computed in this plan.
        """
        endings: dict[SequenceState, Ending] = {}
        self._seats.count_step()
        for planned in plan.rows:
            sequence = planned.sequence
            ending = self._commit_rows(planned, drawn.get(sequence, ()), sequence in failed)
            if ending is not None:
                endings[sequence] = ending
                self.remove(sequence)
        return endings

    def abandon(self, plan: StepPlan) -> None:
        """The plan did not run: free its blocks, and let the sequences it admitted wait again."""
        for planned in plan.rows:
            sequence = planned.sequence
            if self._states is not None and planned.states is not None:
                self._states.abandon(planned.states)
            if planned.is_admitted:
                self._running.remove(sequence)
                self._release(sequence)
                self._enter(self._waiting, sequence, SequenceStatus.WAITING)
            elif planned.num_new_blocks:
                self._pool.release(sequence.blocks[-planned.num_new_blocks :])
                del sequence.blocks[-planned.num_new_blocks :]

    def check_integrity(
        self, others: Iterable[list[int]] = (), plan: StepPlan | None = None
    ) -> None:
        """Assert that the pool's holders are exactly the block tables of all running sequences and
        of ``others``, and that the prefix cache has the right hashes of their blocks.

        ``plan``: one that is neither committed nor abandoned.
        """
        self._pool.check_integrity([*(s.blocks for s in self._running), *others])
        for sequence in self._running:
            assert sequence.num_computed <= len(sequence.blocks) * self._block_size
            assert sequence.seat is not None
            table = self.tables.array[sequence.seat, : len(sequence.blocks)]
            assert table.tolist() == sequence.blocks, "a seat has other blocks than its sequence"
            self.prefixes.check_integrity(sequence)
        for sequence in self._waiting:
            assert not sequence.blocks
            assert sequence.seat is None
            assert not sequence.num_computed
            assert sequence.state is None
        if self._states is not None:
            states = [s.state for s in self._running if s.state is not None]
            planned = () if plan is None else plan.rows
            states += [rows.states.write for rows in planned if rows.states is not None]
            self._states.slots.check_integrity(states)

    def _commit_rows(
        self, planned: PlannedRows, tokens: Sequence[int], has_failed: bool
    ) -> Ending | None:
        """Returns how the sequence ended, if it did."""
        sequence, draws_token = planned.sequence, planned.draws_token
        if sequence.num_cached_tokens is None:
            self.prefixes.count(sequence, planned.first)
        num_accepted = max(len(tokens) - 1, 0)
        count = planned.count - len(planned.drafts) + num_accepted
        sequence.num_computed += count
        self._served.charge(sequence, count)
        if self._states is not None and planned.states is not None:
            self._states.commit(sequence, planned.states, has_failed=has_failed)
        if has_failed:
            return Ending(reason=FinishReason.ERROR)
        for token in tokens if draws_token else ():
            sequence.append(token)
        if planned.drafts:
            self._take_back(sequence)
        self.prefixes.store(sequence, planned.first)
        return self.ending(sequence) if draws_token else None

    def _take_back(self, sequence: SequenceState) -> None:
        """Free the blocks that only rejected drafts needed."""
        needed = self._blocks(sequence.num_computed)
        self._pool.release(sequence.blocks[needed:])
        del sequence.blocks[needed:]

    # Planning

    def _runnable(self) -> tuple[list[SequenceState], list[SequenceState]]:
        """Running sequences that may be planned, in order: those that decode, and the others."""
        decoding: list[SequenceState] = []
        prefilling: list[SequenceState] = []
        is_restricted = bool(self._held) or self._alone is not None
        for sequence in self._running:
            if sequence.is_idle:
                continue
            if not is_restricted or self._may_run(sequence):
                (decoding if sequence.is_decoding else prefilling).append(sequence)
        return decoding, prefilling

    def _who_gives_way(
        self, decoding: Sequence[SequenceState], others: Sequence[SequenceState], num_missing: int
    ) -> Set[str]:
        """Tenants without decodes in the next step, so that it is short. Not in two steps in a row.

        ``others``: sequences that would compute ``num_missing`` rows of prompts beside the decodes.
        """
        if self._gave_way or not others or self._alone is not None:
            return frozenset()
        above = self._seats.above_share(self._running)
        if not any(s.request.tenant not in above and not s.output for s in others):
            return frozenset()
        num_held = sum(s.request.tenant in above for s in decoding)
        is_shorter = 2 * num_held >= len(decoding) and num_missing <= num_held
        return above if is_shorter else frozenset()

    def _plan_decode(
        self, sequence: SequenceState, rows: list[PlannedRows], *, is_admitted: bool
    ) -> None:
        missing = self._num_missing_blocks(sequence)
        if missing:  # most decodes go on in their last block
            self._extend(sequence, self._pool.allocate(missing))
        first = sequence.num_computed
        states = self._moved(sequence, first, 1)
        rows.append(PlannedRows(sequence, first, 1, True, missing, is_admitted, states))

    # Drafts

    def _num_drafts(
        self, decoding: Sequence[SequenceState], num_decodes: int, prefill_rows: int
    ) -> int:
        """Rows of drafts to ask for beside others. None where a tenant gives way: its step is to
        be short.
        """
        speculator = self._speculator
        if speculator is None or not decoding or self._giving_way:
            return 0
        speculator.plan_step(len(decoding))
        room = min(self._max_decode_rows, self._max_rows - prefill_rows) - num_decodes
        return max(min(sum(len(speculator.draft(s)) for s in decoding), room), 0)

    def _add_drafts(
        self, decodes: Sequence[PlannedRows], decode_rows: int, rows: list[PlannedRows]
    ) -> None:
        """Give ``decodes``, the first of ``rows``, drafts: as many rows as are left of those
        granted and of the budget, in blocks that are free. They preempt nothing. The likeliest
        ones are run, whoever's they are.
        """
        left = min(decode_rows - len(decodes), self._max_rows - sum(r.count for r in rows))
        if self._speculator is None or left <= 0:
            return
        found = self._speculator.draft_all([planned.sequence for planned in decodes], left)
        for place, (planned, drafts) in enumerate(zip(decodes, found, strict=True)):
            sequence = planned.sequence
            most = (len(sequence.blocks) + self._pool.num_free) * self._block_size
            if fitting := drafts[: most - sequence.num_tokens]:
                rows[place] = self._with_drafts(planned, fitting)

    def _with_drafts(self, planned: PlannedRows, drafts: tuple[int, ...]) -> PlannedRows:
        sequence = planned.sequence
        missing = self._blocks(sequence.num_tokens + len(drafts)) - len(sequence.blocks)
        if missing > 0:
            self._extend(sequence, self._pool.allocate(missing))
        return replace(
            planned,
            count=1 + len(drafts),
            num_new_blocks=planned.num_new_blocks + max(missing, 0),
            drafts=drafts,
        )

    def _moved(self, sequence: SequenceState, first: int, count: int) -> StateMove | None:
        return None if self._states is None else self._states.plan(sequence, first, count)

    def _make_room(self, decode_rows: int) -> tuple[list[SequenceState], list[SequenceState]]:
        """Preempt sequences until there are blocks for the next rows of those that decode.

        Returns the first ``decode_rows`` of these, and those that do not decode.
        """
        while True:
            decoding, prefilling = self._runnable()
            others = [s for s in decoding if not self._gives_way(s)]
            if decode_rows <= len(others):
                decoding = others
            else:  # more is granted: it was before they were to give way
                self._giving_way = frozenset()
            del decoding[decode_rows:]
            has_enough = self._pool.can_allocate(len(decoding))  # each needs one block at most
            if has_enough or self._pool.can_allocate(sum(map(self._num_missing_blocks, decoding))):
                return decoding, prefilling
            self._preempt(self._last())

    def _num_missing_blocks(self, decoding: SequenceState) -> int:
        return self._blocks(decoding.num_tokens) - len(decoding.blocks)

    def _plan_chunk(self, sequence: SequenceState, limit: int, rows: list[PlannedRows]) -> int:
        """Plan up to ``limit`` rows of a prompt (or of a recomputation); returns how many."""
        is_admitted = sequence.status is SequenceStatus.WAITING
        if is_admitted and not self._still_fits(sequence):
            return 0
        new_blocks = self._admit(sequence) if is_admitted else 0
        count = min(limit, sequence.num_missing)
        first = sequence.num_computed
        states = self._moved(sequence, first, count)
        rows.append(PlannedRows(sequence, first, count, False, new_blocks, is_admitted, states))
        return count

    def _admissible(self, max_rows: int) -> Iterator[SequenceState]:
        """Waiting sequences in order, as long as seats, free blocks and rows last.

        Known blocks without a holder count as taken from the free ones by each sequence that would
        use them. A tenant above its share leaves seats free, and blocks for as many sequences,
        at most the same part of all blocks.
        """
        if not self._waiting:
            return
        free = self._pool.num_free - self._reserve(self._running)
        seats = self._max_num_seqs - len(self._running)
        left_free = self._seats.seats_left_free(self._running if self._alone is None else ())
        held_back: set[str] = set()  # tenants
        for sequence in self._served.in_turn(self._waiting):
            if seats <= 0 or max_rows <= 0:
                return
            num_left, tenant = left_free.of(sequence), sequence.request.tenant
            if seats > num_left and self._waits_for_kv(sequence):
                seats -= 1
                free -= self._num_missing_beside_coming(sequence) + self._reserve((sequence,))
                continue
            if not self._may_run(sequence) or seats <= num_left or tenant in held_back:
                continue
            found = self.prefixes.find(sequence)
            if self._waits_for_first_choice(sequence) and len(found) < self._num_shared(sequence):
                continue
            blocks = self._blocks(sequence.num_tokens)
            taken = blocks - sum(not self._pool.is_free(block) for block in found)
            spare = min(num_left * blocks, self._pool.num_blocks // RESERVED_ONE_IN)
            if num_left and free - taken < spare:
                held_back.add(tenant)
                continue
            free -= taken
            if free < 0:
                return
            free -= self._reserve((sequence,))
            left_free.take(sequence)
            seats -= 1
            max_rows -= sequence.num_tokens - len(found) * self._block_size
            yield sequence

    def _waits_for_kv(self, sequence: SequenceState) -> bool:
        """Its blocks are on their way, and not those of the first choice for it."""
        is_held = sequence.request.request_id in self.kv_waits
        return is_held and not self._waits_for_first_choice(sequence)

    def _num_missing_beside_coming(self, sequence: SequenceState) -> int:
        """Free blocks to keep for one whose other blocks are on their way."""
        coming = self.kv_waits.num_coming(sequence.request.request_id)
        return max(self._blocks(sequence.num_tokens) - coming, 0)

    def _gives_way(self, sequence: SequenceState) -> bool:
        """It runs no decode in the next step: see ``_who_gives_way``."""
        return sequence.request.tenant in self._giving_way

    def _ready(self, max_rows: int) -> list[SequenceState]:
        """Waiting sequences that would decode, once admitted."""
        if not any(s.output for s in self._waiting):
            return []
        return [s for s in self._admissible(max_rows) if self._would_decode(s)]

    def _would_decode(self, waiting: SequenceState) -> bool:
        """All but its newest output token are known: it comes from another worker, as a rule."""
        return bool(waiting.output) and self._num_to_compute(waiting) == 1

    def _admit_ready(self, decode_rows: int) -> list[SequenceState]:
        """Admit sequences that would decode, as many as were granted beside the running ones."""
        ready = [s for s in self._ready(self._max_rows) if not self._gives_way(s)]
        if ready:
            decoding, _ = self._runnable()
            spare = decode_rows - sum(not self._gives_way(s) for s in decoding)
            del ready[max(spare, 0) :]
        admitted = []
        for sequence in ready:
            if self._still_fits(sequence):
                self._admit(sequence)
                admitted.append(sequence)
        return admitted

    def _admit(self, sequence: SequenceState) -> int:
        """Move to running with blocks for all its tokens; returns how many were allocated."""
        sequence.seat = self.tables.take_seat()
        self._extend(sequence, self.prefixes.find(sequence))
        self._pool.share(sequence.blocks)
        self.prefixes.begin(sequence)
        if self._states is not None:
            self._states.admit(sequence)
        sequence.num_computed = len(sequence.blocks) * self._block_size
        missing = self._blocks(sequence.num_tokens) - len(sequence.blocks)
        self._extend(sequence, self._pool.allocate(missing))
        self._waiting.remove(sequence)
        self.kv_waits.forget(sequence.request.request_id)
        self._enter(self._running, sequence, SequenceStatus.RUNNING)
        return missing

    # Blocks

    def _blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)

    def _extend(self, sequence: SequenceState, blocks: list[int]) -> None:
        """Append blocks to the table of a sequence that has a seat."""
        assert sequence.seat is not None, "only running sequences get blocks"
        self.tables.put(sequence.seat, len(sequence.blocks), blocks)
        sequence.blocks += blocks

    def _num_to_compute(self, waiting: SequenceState) -> int:
        """Rows that it would run if it were admitted now."""
        return waiting.num_tokens - len(self.prefixes.find(waiting)) * self._block_size

    def _has_room_beside(self, parent: SequenceState, child: SequenceState) -> bool:
        """Whether a fork can run at once: as for an admission, others must be able to grow."""
        if parent.status is not SequenceStatus.RUNNING or len(self._running) >= self._max_num_seqs:
            return False
        reserve = self._reserve((*self._running, child))
        return self._pool.can_allocate(1 + reserve)

    def _still_fits(self, admissible: SequenceState) -> bool:
        """Whether there are blocks for it though a cached block or a recurrent state of its prefix
        may be gone since it was found admissible, so that it takes more of them.
        """
        held = sum(not self._pool.is_free(block) for block in self.prefixes.find(admissible))
        missing = self._blocks(admissible.num_tokens) - held
        has_enough = self._pool.can_allocate(missing + len(self._running))  # each needs one at most
        return has_enough or self._pool.can_allocate(missing + self._reserve(self._running))

    def _reserve(self, sequences: Iterable[SequenceState]) -> int:
        """Blocks to leave free at an admission: one for each sequence that may need another."""
        return sum(map(self._may_grow, sequences))

    def _may_grow(self, sequence: SequenceState) -> bool:
        is_running = sequence.status is SequenceStatus.RUNNING
        held = len(sequence.blocks) if is_running else self._blocks(sequence.num_tokens)
        read = sequence.prompt_length + sequence.params.max_tokens - 1  # not the last one drawn
        return self._blocks(min(read, self._max_model_len)) > held

    def under_pressure(self) -> SequenceState | None:
        """The sequence that would be preempted first of those that can go on elsewhere, if that may
        be soon; else None. A search would begin anew there.
        """
        others = self._running if self._alone is None else []
        is_short = self._pool.num_free < _BLOCKS_AHEAD * len(others) and len(others) > 1
        able = [s for s in others if s.params.beams is None]
        return _last_of_most(able) if is_short and able else None

    def _last(self) -> SequenceState:
        """The running sequence to preempt: an idle one, or one that does not run alone, if there is
        one."""
        idle = [s for s in self._running if s.is_idle]
        others = [s for s in self._running if self._alone is None or not self._may_run(s)]
        return _last_of_most(idle or others or self._running)

    def _preempt(self, victim: SequenceState) -> None:
        self._running.remove(victim)
        self._release(victim)
        self._enter(self._waiting, victim, SequenceStatus.WAITING)
        self.kv_waits.queue(victim.request.request_id)
        self.num_preemptions += 1
        self.preempted.append(victim)

    def _first_in_need(self) -> SequenceState | None:
        """The first waiting sequence, if it fits only once lower priorities are preempted, or for
        one that runs alone all others.
        """
        able = (s for s in self._served.in_turn(self._waiting) if self._may_run(s))
        first = next((s for s in able if not self._waits_for_first_choice(s)), None)
        if first is None:
            return None
        if self._alone is None:
            stay = [s for s in self._running if not _yields(s, first.request)]
        else:
            stay = [s for s in self._running if self._may_run(s)]
        if len(stay) == len(self._running) or first in self._admissible(self._max_rows):
            return None
        held = {block for s in stay for block in s.blocks}
        missing = self._blocks(first.num_tokens) - len(held.intersection(self.prefixes.find(first)))
        free = self._pool.num_blocks - len(held) - self._reserve(stay)
        return first if missing <= free else None

    def _release(self, sequence: SequenceState, *, has_ended: bool = False) -> None:
        self.prefixes.release(sequence, has_ended=has_ended)
        sequence.num_computed = 0
        if self._states is not None:
            self._states.release(sequence)
        if sequence.seat is not None:
            self.tables.free_seat(sequence.seat)
            sequence.seat = None

    def _may_run(self, sequence: SequenceState) -> bool:
        if sequence.is_idle:
            return False
        request_id = sequence.request.request_id
        if sequence.status is SequenceStatus.WAITING and request_id in self.kv_waits:
            return False
        if self._alone is not None:
            return request_id == self._alone
        return request_id not in self._held

    def _num_shared(self, sequence: SequenceState) -> int:
        """Full prompt blocks that choices share; at least one prompt token is left to compute."""
        return (sequence.prompt_length - 1) // self._block_size

    def _waits_for_first_choice(self, sequence: SequenceState) -> bool:
        """The first choice of its request is going to compute the prompt's full blocks."""
        first = sequence.first_choice
        if first is None or first.is_idle or first.status is SequenceStatus.FINISHED:
            return False
        return first.num_computed < self._num_shared(sequence) * self._block_size

    @staticmethod
    def _enter(queue: list[SequenceState], sequence: SequenceState, status: SequenceStatus) -> None:
        sequence.status = status
        insort(queue, sequence, key=attrgetter("order"))


def _yields(running: SequenceState, waiting: Request) -> bool:
    """A running sequence is preempted for a waiting request of the same tenant with higher
    priority; an idle one for any."""
    request = running.request
    has_lower = request.tenant == waiting.tenant and request.priority > waiting.priority
    return running.is_idle or has_lower


def _last_of_most(running: Sequence[SequenceState]) -> SequenceState:
    """Of the tenant with the most sequences the last; of several tenants the last of all."""
    counts = Counter(s.request.tenant for s in running)
    most = max(counts.values())
    return next(s for s in reversed(running) if counts[s.request.tenant] == most)
