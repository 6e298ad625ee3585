"""Which rows run in the next step: continuous batching with chunked prefill. Pure, no torch.

A plan is made from what the step header grants, and then either committed (the model ran to its
last layer) or abandoned (a peer was lost): only a commit changes what sequences have computed and
produced. Preemption is the exception: it happens while planning and stays, since it costs a
recomputation but never changes a token.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from workers.kv_blocks import BlockPool
from workers.request import FinishReason
from workers.sequence import Ending, Sequence, SequenceState


@dataclass(frozen=True, slots=True)
class PlannedRows:
    """Neighbouring rows of one sequence in a plan. Its block table covers them already."""

    sequence: Sequence
    """Whose rows."""
    first: int
    """Position of the first row."""
    count: int
    """Rows."""
    is_decode: bool
    """One row that continues an output."""
    num_new_blocks: int
    """Blocks at the end of the block table that this plan allocated."""
    is_admitted: bool
    """The sequence was waiting before this plan."""

    @property
    def draws_token(self) -> bool:
        """The last row is the newest token: its logits give the next one."""
        return self.first + self.count == self.sequence.num_tokens


@dataclass(frozen=True, slots=True)
class Plan:
    """The rows of one step."""

    rows: tuple[PlannedRows, ...]
    """Decodes first, each part in the order of priority and arrival."""

    @property
    def num_rows(self) -> int:
        """Rows of the batch."""
        return sum(r.count for r in self.rows)


@dataclass(frozen=True, kw_only=True, slots=True)
class RowsWanted:
    """What the next step could run, for the proposal to the leader."""

    decode_rows: int
    """One per decoding sequence."""
    prefill_rows: int
    """Prompt rows within the token budget."""


class Scheduler:
    """Sequences, their blocks, and the plan of a step.

    At admission a sequence gets the blocks of all tokens it has, so that only decodes can run short
    of blocks later. Then the newest sequence gives way: it waits again and is recomputed from
    prompt and output.
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
    ) -> None:
        self._pool = pool
        self._block_size = block_size
        self._max_num_seqs = max_num_seqs
        self._max_rows = max_num_batched_tokens
        self._max_model_len = max_model_len
        self._eos = frozenset(eos_token_ids)
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self.num_preemptions = 0
        """Preemptions so far."""

    @property
    def waiting(self) -> list[Sequence]:
        """Sequences that wait for their first or next admission, in order."""
        return list(self._waiting)

    @property
    def running(self) -> list[Sequence]:
        """Sequences that take part in steps, in order."""
        return list(self._running)

    @property
    def num_waiting(self) -> int:
        """Number of waiting sequences."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Number of running sequences."""
        return len(self._running)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence behind those of its priority."""
        self._enter(self._waiting, sequence, SequenceState.WAITING)

    def remove(self, sequence: Sequence, may_share: bool = True) -> None:
        """End a sequence between steps; its blocks are free at once.

        ``may_share`` False: what its blocks hold is not fit for other choices of the request.
        """
        if sequence.state is SequenceState.FINISHED:
            return
        here = self._running if sequence.state is SequenceState.RUNNING else self._waiting
        here.remove(sequence)
        if may_share:
            self._share_with_siblings(sequence)
        self._release(sequence)
        sequence.state = SequenceState.FINISHED

    def ending(self, sequence: Sequence) -> Ending | None:
        """Whether, and why, the output so far ends the sequence."""
        params, output = sequence.params, sequence.output
        if output and len(output) >= params.min_tokens:
            if output[-1] in self._eos and not params.ignore_eos:
                return Ending(reason=FinishReason.STOP)
            if output[-1] in params.stop_token_ids:
                return Ending(reason=FinishReason.STOP, stop_token_id=output[-1])
        if len(output) >= params.max_tokens or sequence.num_tokens >= self._max_model_len:
            return Ending(reason=FinishReason.LENGTH)
        return None

    def wanted(self) -> RowsWanted:
        """Rows that the next step would run if all were granted."""
        decodes = sum(s.is_decoding for s in self._running)
        missing = sum(s.num_missing for s in self._running if not s.is_decoding)
        missing += sum(s.num_missing for s in self._admissible())
        if not self._running and not missing and self._waiting:
            missing = self._waiting[0].num_missing  # the others give way while planning
        prefill = min(missing, self._max_rows - decodes)
        return RowsWanted(decode_rows=decodes, prefill_rows=prefill)

    def schedule(self, decode_rows: int, prefill_rows: int) -> Plan:
        """Choose rows within what was granted, and allocate their blocks."""
        rows: list[PlannedRows] = []
        for sequence in self.running:
            if sequence.is_decoding and len(rows) < decode_rows:
                self._plan_decode(sequence, rows)
        left = min(prefill_rows, self._max_rows - len(rows))
        for sequence in self.running:
            if left > 0 and not sequence.is_decoding:
                left -= self._plan_chunk(sequence, left, rows)
        if left > 0 and not self._running:
            self._make_room_for_first()
        for sequence in list(self._admissible()) if left > 0 else ():
            if left > 0:
                new_blocks = self._admit(sequence)
                left -= self._plan_chunk(sequence, left, rows, new_blocks, is_admitted=True)
        return Plan(rows=tuple(rows))

    def commit(
        self, plan: Plan, drawn: Mapping[Sequence, int], failed: Collection[Sequence]
    ) -> dict[Sequence, Ending]:
        """The plan ran. ``drawn`` has the token of each sequence that drew one.

        Returns the sequences that ended, with the reason; their blocks are free. ``failed`` ones
        end without a token.
        """
        endings: dict[Sequence, Ending] = {}
        for planned in plan.rows:
            sequence = planned.sequence
            sequence.num_computed += planned.count
            ending: Ending | None = None
            if sequence in failed:
                ending = Ending(reason=FinishReason.ERROR)
            elif planned.draws_token:
                if sequence in drawn:
                    sequence.output.append(drawn[sequence])
                ending = self.ending(sequence)
            if ending is not None:
                endings[sequence] = ending
                self.remove(sequence, may_share=sequence not in failed)
        return endings

    def abandon(self, plan: Plan) -> None:
        """The plan did not run: give back its blocks, and return who was admitted for it."""
        for planned in plan.rows:
            sequence = planned.sequence
            if planned.num_new_blocks:
                self._pool.release(sequence.blocks[-planned.num_new_blocks :])
                del sequence.blocks[-planned.num_new_blocks :]
            if planned.is_admitted:
                self._running.remove(sequence)
                self._enter(self._waiting, sequence, SequenceState.WAITING)

    def check_integrity(self) -> None:
        """Assert that the pool's holders are exactly the block tables of all sequences."""
        self._pool.check_integrity([s.blocks for s in (*self._running, *self._waiting)])
        for sequence in self._running:
            assert sequence.num_computed <= len(sequence.blocks) * self._block_size

    # Planning

    def _plan_decode(self, sequence: Sequence, rows: list[PlannedRows]) -> None:
        if sequence.state is not SequenceState.RUNNING:
            return  # it gave way to one before it
        missing = self._blocks(sequence.num_tokens) - len(sequence.blocks)
        while not self._pool.can_allocate(missing):
            if not self._give_way(sequence):
                return
        sequence.blocks += self._pool.allocate(missing)
        rows.append(PlannedRows(sequence, sequence.num_computed, 1, True, missing, False))

    def _plan_chunk(
        self,
        sequence: Sequence,
        limit: int,
        rows: list[PlannedRows],
        new_blocks: int = 0,
        is_admitted: bool = False,
    ) -> int:
        """Plan up to ``limit`` rows of a prompt (or of a recomputation); returns how many."""
        count = min(limit, sequence.num_missing)
        first = sequence.num_computed
        rows.append(PlannedRows(sequence, first, count, False, new_blocks, is_admitted))
        return count

    def _admissible(self) -> Iterator[Sequence]:
        """Waiting sequences in order, as far as seats and free blocks go."""
        free, seats = self._pool.num_free, self._max_num_seqs - len(self._running)
        for sequence in self._waiting:
            if self._waits_for_leader(sequence):
                continue
            free -= self._blocks_to_admit(sequence)
            if free < 0 or seats <= 0:
                return
            seats -= 1
            yield sequence

    def _admit(self, sequence: Sequence) -> int:
        """Move to running with blocks for all its tokens; returns how many were allocated."""
        leader = sequence.leader
        if leader is not None and leader.state is SequenceState.RUNNING:
            self._share(leader, sequence)
        missing = self._blocks(sequence.num_tokens) - len(sequence.blocks)
        sequence.blocks += self._pool.allocate(missing)
        self._waiting.remove(sequence)
        self._enter(self._running, sequence, SequenceState.RUNNING)
        return missing

    # Blocks

    def _blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)

    def _blocks_to_admit(self, sequence: Sequence) -> int:
        leader = sequence.leader
        shared = len(sequence.blocks)
        if not shared and leader is not None and leader.state is SequenceState.RUNNING:
            shared = self._shareable(sequence)
        return self._blocks(sequence.num_tokens) - shared

    def _give_way(self, sequence: Sequence) -> bool:
        """Free blocks for a decode: the newest holder gives up its own.

        Returns False when that is the sequence itself.
        """
        holders = [s for s in self._waiting if s.blocks]
        if holders:
            self._release(holders[-1])
            return True
        victim = self._running[-1]
        self._running.remove(victim)
        self._release(victim)
        self._enter(self._waiting, victim, SequenceState.WAITING)
        self.num_preemptions += 1
        return victim is not sequence

    def _make_room_for_first(self) -> None:
        """Nobody runs: blocks that later waiting sequences hold go to the first one."""
        first = next((s for s in self._waiting if not self._waits_for_leader(s)), None)
        for holder in reversed(self._waiting):
            if first is None or self._pool.can_allocate(self._blocks_to_admit(first)):
                return
            if holder is not first:
                self._release(holder)

    def _release(self, sequence: Sequence) -> None:
        self._pool.release(sequence.blocks)
        sequence.blocks.clear()
        sequence.num_computed = 0

    # Choices of one request share the full blocks of its prompt

    def _shareable(self, sequence: Sequence) -> int:
        """Full prompt blocks, leaving at least one prompt token to compute."""
        return (sequence.prompt_length - 1) // self._block_size

    def _waits_for_leader(self, sequence: Sequence) -> bool:
        leader = sequence.leader
        if leader is None or sequence.blocks or leader.state is SequenceState.FINISHED:
            return False
        return leader.num_computed < self._shareable(sequence) * self._block_size

    def _share(self, leader: Sequence, sequence: Sequence) -> None:
        count = self._shareable(sequence)
        if sequence.blocks or not count or leader.num_computed < count * self._block_size:
            return
        sequence.blocks += leader.blocks[:count]
        self._pool.share(sequence.blocks)
        sequence.num_computed = count * self._block_size

    def _share_with_siblings(self, leader: Sequence) -> None:
        for sequence in self._waiting:
            if sequence.leader is leader:
                self._share(leader, sequence)

    @staticmethod
    def _enter(queue: list[Sequence], sequence: Sequence, state: SequenceState) -> None:
        sequence.state = state
        insort(queue, sequence, key=lambda s: s.order)
