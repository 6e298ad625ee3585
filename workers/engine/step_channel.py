"""Messages by which all ranks agree on the next step: proposals to the leader, headers from it.

    attention worker                          expert worker
    channel.propose(rows)
    header = channel.wait(timeout)            header = channel.wait(timeout)
    run the step                              serve the step

Without work, all ranks are blocked in ``wait``. If a rank receives a request, the receiving thread
calls ``connections.wake()``. ``wait`` then returns None, the rank proposes again for the same step,
and the leader sends the header. If the leader sent this header before the new proposal, the rank
takes part in the step without rows and proposes for the next step.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.core.errors import ProtocolError
from cluster.core.topology import Generation
from workers.engine.leader import StepSize, decide_header, step_sizes
from workers.engine.micro_batches import MicroBatchRule
from workers.engine.prefill_cap import PrefillCap
from workers.requests.step_header import HEADERS, PROPOSALS, StepHeader, StepProposal
from workers.scheduling.step_plan import RowsWanted
from workers.transport.edge_table import StepFrame
from workers.transport.frames import FrameHeader, FrameKind
from workers.transport.peer_connections import PeerConnections

logger = logging.getLogger(__name__)

_QUIET_S = 3.0
"""Seconds without rows after which steps of padding may run. Requests wait at most 2 s for KV
blocks (``kv_fetch_limit_s``), and a capture takes about a second."""


@dataclass(frozen=True, slots=True)
class _Ranks:
    """The attention ranks of one generation."""

    generation: Generation
    leader: str
    """Name of the worker with the lowest rank."""
    by_name: dict[str, int]
    in_order: list[int]

    @classmethod
    def of(cls, generation: Generation) -> _Ranks:
        by_name = {m.name: m.rank for m in generation.attention}
        return cls(generation, next(iter(by_name), ""), by_name, list(by_name.values()))


class StepChannel:
    """Sends a worker's proposals to the leader, and receives step headers. Data thread only.

    On the leader it also receives the proposals, decides the headers and sends them.
    """

    def __init__(
        self,
        connections: PeerConnections,
        *,
        prefill_cap: PrefillCap,
        micro_batches: MicroBatchRule,
        buckets: Sequence[int] = (),
        max_static_ranks: int = 0,
    ) -> None:
        """All arguments but the first are the leader's policies: the limit of prefill rows over all
        ranks, the split of a step, the sizes to which decode rows are padded, and the largest
        number of expert ranks that all receive all rows of prompts.
        """
        self._connections = connections
        self._prefill_cap = prefill_cap
        self._micro_batches = micro_batches
        self._buckets = buckets
        self._max_static_ranks = max_static_ranks
        self._new_sizes: list[StepSize] = []
        """On the leader: sizes that no step of this generation has had."""
        self._had_rows_at = 0.0
        """Monotonic time of the last header with rows, or of the generation's start."""
        self._known = _Ranks.of(connections.generation)
        self.highest_step = 0
        """Highest step number of all headers received, in any generation; 0 before the first."""
        self.last_rows = 0
        """Number of rows of all ranks in the newest header; 0 at the start of a generation."""
        self.highest_epoch = 0
        """Highest placement epoch of all headers received; 0 before the first header."""
        self._next_step = 1
        self._epoch = 0
        self._oldest_epoch = 0
        self._decided_epoch = 0
        self._proposals: dict[int, StepProposal] = {}
        self._headers: deque[StepHeader] = deque()
        self._running_step: tuple[StepHeader, float] | None = None  # with its start time
        self._is_timed = True

    @property
    def has_header(self) -> bool:
        """Whether ``wait`` would return a header without waiting."""
        return bool(self._headers)

    @property
    def is_leader(self) -> bool:
        """Whether this worker is the leader of the current generation, which decides headers."""
        return self._ranks.leader == self._connections.me.name

    @property
    def _ranks(self) -> _Ranks:
        """The attention ranks of the current generation."""
        generation = self._connections.generation
        if self._known.generation is not generation:
            self._known = _Ranks.of(generation)
        return self._known

    def missing_workers(self) -> list[str]:
        """Return the names of the workers that must send a message before the next step starts.

        On the leader: attention ranks without a proposal. On all other workers: the leader.
        """
        if not self.is_leader:
            return [self._ranks.leader]
        return [name for name, rank in self._ranks.by_name.items() if rank not in self._proposals]

    def start_generation(self, first_step: int, epoch: int) -> None:
        """Drop all state of the old generation; the next step is ``first_step``.

        Call it after ``connections.apply_generation``. ``epoch`` is the authoritative placement
        epoch, which the leader puts into its headers.
        """
        self._next_step = first_step
        self.last_rows = 0
        self._proposals.clear()
        self._headers.clear()
        self._running_step = None
        self._decided_epoch = epoch
        generation = self._connections.generation
        if len(generation.members) > 1 and not generation.returns_slots:
            self._new_sizes = list(step_sizes(self._buckets, self._micro_batches))
        else:
            self._new_sizes = []
        self._had_rows_at = time.monotonic()
        self.set_epoch(epoch, epoch)

    def set_epoch(self, epoch: int, oldest_epoch: int) -> None:
        """Set the placement epoch that the leader puts into the next headers.

        After a change of the epoch, the leader sends the next header when all ranks have proposed,
        even if no rank wants a row. ``oldest_epoch``: the oldest epoch that steps may still use.
        """
        self._epoch = epoch
        self._oldest_epoch = oldest_epoch

    def propose(self, rows: RowsWanted, *, even_empty: bool = False, is_timed: bool = True) -> None:
        """Propose this attention rank's rows for the next step, replacing its earlier proposal.

        ``even_empty``, on the leader: start a step once all ranks have proposed, even if no rank
        has rows. ``is_timed``, on the leader: whether the time since the last header is that of one
        step. No effect if the header of the next step has arrived. Raises the errors of
        ``PeerConnections.send``.
        """
        connections = self._connections
        self._is_timed = is_timed
        self._take_step_frames()
        if self._headers:
            return  # the step is already decided; the rank proposes again after it
        proposal = StepProposal(
            generation=connections.generation.number,
            step=self._next_step,
            rank=connections.me.rank,
            decode_rows=rows.decode_rows,
            prefill_rows=rows.prefill_rows,
            edge_share=rows.edge_share,
            is_alone=rows.is_alone,
            parents=rows.parents,
            draft_rows=rows.draft_rows,
        )
        if self.is_leader:
            self._proposals[connections.me.rank] = proposal
            self._decide(even_empty)
        else:
            data = PROPOSALS.encode(proposal)
            self._send(self._ranks.leader, FrameKind.PROPOSAL, proposal, data)

    def wait(self, timeout_s: float) -> StepHeader | None:
        """Wait for the next header; None after ``timeout_s`` or after ``connections.wake``.

        Raises ``PeerLostError`` and ``GenerationChangedError``.
        """
        connections = self._connections
        deadline = time.monotonic() + timeout_s
        connections.check()
        with connections.awaiting():
            while True:
                self._take_step_frames()
                if self._headers:
                    return self._next_header()
                left = deadline - time.monotonic()
                if left <= 0 or connections.take_wake():
                    return None
                connections.loop.awaited = tuple(self.missing_workers())
                connections.poll(left)

    def _next_header(self) -> StepHeader:
        header = self._headers.popleft()
        self._next_step = header.step + 1
        self.last_rows = header.decode_rows + header.prefill_rows
        self.highest_step = max(self.highest_step, header.step)
        self.highest_epoch = max(self.highest_epoch, header.epoch)
        return header

    def _take_step_frames(self) -> None:
        while self._connections.step_frames:
            step_frame = self._connections.step_frames.popleft()
            try:
                self._handle_step_frame(step_frame)
            except ProtocolError as err:
                self._connections.reject(step_frame.sender.name, str(err))

    def _handle_step_frame(self, step_frame: StepFrame) -> None:
        frame, sender = step_frame.frame, step_frame.sender
        data, ranks = frame.payload.data, self._ranks
        if frame.header.kind is FrameKind.PROPOSAL:
            proposal = PROPOSALS.decode(data)
            self._check_step(frame.header, proposal.generation, proposal.step)
            if not self.is_leader or proposal.rank != ranks.by_name.get(sender.name):
                raise ProtocolError(f"proposal of rank {proposal.rank} from {sender.name}")
            self._take_proposal(proposal)
            return
        header = HEADERS.decode(data)
        self._check_step(frame.header, header.generation, header.step)
        if sender.name != ranks.leader:
            raise ProtocolError(f"step header from {sender.name}, which is not the leader")
        expected = self._headers[-1].step + 1 if self._headers else self._next_step
        if header.step != expected:
            raise ProtocolError(f"step header {header.step}: must be {expected}")
        _check_members(header, ranks)
        self._headers.append(header)

    def _check_step(self, frame: FrameHeader, generation: int, step: int) -> None:
        if (generation, step) != (frame.generation, frame.step):
            raise ProtocolError("a step message and its frame have different steps")

    def _take_proposal(self, proposal: StepProposal) -> None:
        decided = self._headers[-1].step if self._headers else self._next_step - 1
        if proposal.step <= decided:
            return  # sent before the header arrived; its rank proposes again after that step
        if proposal.step != decided + 1:
            raise ProtocolError(f"proposal for step {proposal.step}: must be {decided + 1}")
        self._proposals[proposal.rank] = proposal
        if not self._headers:
            self._decide()

    def _decide(self, even_empty: bool = False) -> None:
        """On the leader: if all ranks have proposed and there is a step to run, send its header."""
        if len(self._proposals) < len(self._ranks.by_name):
            return
        self._observe_step()
        generation = self._connections.generation
        decode_rows = sum(proposal.decode_rows for proposal in self._proposals.values())
        has_few_ranks = 0 < len(generation.experts) <= self._max_static_ranks
        header = decide_header(
            self._proposals,
            generation=generation.number,
            step=self._next_step,
            epoch=self._epoch,
            oldest_epoch=self._oldest_epoch,
            max_prefill_rows=self._prefill_cap.rows(decode_rows, len(self._proposals)),
            micro_batches=self._micro_batches,
            buckets=() if generation.returns_slots else self._buckets,
            has_static_prompts=has_few_ranks and not generation.returns_slots,
            even_empty=even_empty or self._epoch != self._decided_epoch,
            idle_size=self._idle_size(),
        )
        if header is None:
            return
        self._note_step(header)
        self._decided_epoch = header.epoch
        self._proposals.clear()
        data = HEADERS.encode(header)
        for member in generation.members:
            if member.name != self._connections.me.name:
                self._send(member.name, FrameKind.HEADER, header, data)
        self._headers.append(header)
        self._running_step = (header, time.monotonic())

    def _idle_size(self) -> StepSize | None:
        """Return the size of a step to run if no rank wants rows; None if there is no new size, or
        a request may soon have rows, which the step would delay."""
        if not self._new_sizes or time.monotonic() - self._had_rows_at < _QUIET_S:
            return None
        return self._new_sizes[0]

    def _note_step(self, header: StepHeader) -> None:
        if header.decode_rows + header.prefill_rows:
            self._had_rows_at = time.monotonic()
        size = StepSize(header.bucket, header.num_micro_batches)
        if size in self._new_sizes and not header.edge_limit:
            self._new_sizes.remove(size)
            if not self._new_sizes:
                logger.info("steps of every size have run and are captured")

    def _observe_step(self) -> None:
        """On the leader: record the time of the previous step, as all ranks have proposed again."""
        if self._running_step is None:
            return
        (header, start), self._running_step = self._running_step, None
        seconds = time.monotonic() - start
        if self._is_timed:
            self._prefill_cap.observe(header.decode_rows, header.prefill_rows, seconds)

    def _send(
        self, name: str, kind: FrameKind, message: StepProposal | StepHeader, data: bytes
    ) -> None:
        frame = FrameHeader(kind, message.generation, message.step, length=len(data))
        self._connections.send(name, frame, [data])


def _check_members(header: StepHeader, expected: _Ranks) -> None:
    ranks = [rank for rank, _ in header.grants]
    if ranks != expected.in_order:
        raise ProtocolError(f"step header grants ranks {ranks}: must be {expected.in_order}")
