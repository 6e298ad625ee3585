"""Proposals to the leader and headers from it: how all ranks agree on the next step.

    attention worker                          expert worker
    channel.propose(decode, prefill)
    header = channel.wait(timeout)            header = channel.wait(timeout)
    run the step                              serve the step

While nobody has work, everyone is blocked in ``wait``. A rank that gets a request calls
``hub.wake()`` (from its other thread), leaves ``wait`` with None, and proposes again for the same
step: that is the doorbell, the header follows at once. If the header of that step was already on
its way, the rank runs its zero rows and proposes for the next step.
"""

from __future__ import annotations

import time
from collections import deque

from cluster.errors import ProtocolError
from cluster.topology import Generation
from workers.dist.edge_table import StepFrame
from workers.dist.frames import FrameHeader, FrameKind
from workers.dist.header import StepHeader, StepProposal, decide_header
from workers.dist.hub import PeerHub
from workers.dist.micro_batches import MicroBatchRule
from workers.dist.prefill_cap import PrefillCap

_ONE_MICRO_BATCH = MicroBatchRule()


class StepChannel:
    """One worker's end of the step protocol. Data thread only (as the hub)."""

    def __init__(
        self,
        hub: PeerHub,
        *,
        prefill_cap: PrefillCap,
        micro_batches: MicroBatchRule = _ONE_MICRO_BATCH,
    ) -> None:
        """``prefill_cap`` limits the prefill rows of one step over all ranks, ``micro_batches``
        decides on the split of a step; both are the leader's.
        """
        self._hub = hub
        self._prefill_cap = prefill_cap
        self._micro_batches = micro_batches
        self.highest_step = 0
        """Highest step that a header was seen for, in any generation."""
        self.highest_epoch = 0
        """Highest placement epoch that a header named."""
        self._next_step = 1
        self._epoch = 0
        self._oldest_epoch = 0
        self._decided_epoch = 0
        self._proposals: dict[int, StepProposal] = {}
        self._headers: deque[StepHeader] = deque()
        self._timed: tuple[StepHeader, float] | None = None  # the step under way, and its start

    @property
    def is_leader(self) -> bool:
        """Whether this worker publishes the headers of the current generation."""
        return self._hub.generation.leader.name == self._hub.me.name

    @property
    def next_step(self) -> int:
        """Step that the next proposal is for."""
        return self._next_step

    def start_generation(
        self, first_step: int, epoch: int, oldest_epoch: int | None = None
    ) -> None:
        """Drop everything of the old generation; steps go on at ``first_step``.

        Call it after ``hub.apply_generation``. ``epoch`` is the authoritative placement epoch; the
        leader puts it into its headers.
        """
        self._next_step = first_step
        self._proposals.clear()
        self._headers.clear()
        self._timed = None
        self._decided_epoch = epoch
        self.set_epoch(epoch, epoch if oldest_epoch is None else oldest_epoch)

    def set_epoch(self, epoch: int, oldest_epoch: int) -> None:
        """Leader: epoch of the headers from now on.

        The next header follows even if nobody wants a row, when all ranks have proposed.
        """
        self._epoch = epoch
        self._oldest_epoch = oldest_epoch

    def propose(
        self,
        decode_rows: int,
        prefill_rows: int,
        *,
        is_alone: bool = False,
        even_empty: bool = False,
    ) -> None:
        """Attention ranks: say what this rank wants in the next step; replaces what it said.

        ``is_alone`` asks for a step without rows of other requests.
        With ``even_empty`` a leader has the step run once all have reported, also without a row.
        Raises as ``hub.send`` does.
        """
        hub = self._hub
        self._take_step_frames()
        if self._headers:
            return  # the step is already decided: propose again after it
        proposal = StepProposal(
            generation=hub.generation.number,
            step=self._next_step,
            rank=hub.me.rank,
            decode_rows=decode_rows,
            prefill_rows=prefill_rows,
            is_alone=is_alone,
        )
        if self.is_leader:
            self._proposals[hub.me.rank] = proposal
            self._decide(even_empty)
        else:
            self._send(hub.generation.leader.name, FrameKind.PROPOSAL, proposal)

    def wait(self, timeout_s: float) -> StepHeader | None:
        """The next header; None after ``timeout_s`` or when ``hub.wake`` was called.

        Raises ``PeerLostError`` and ``GenerationChangedError``.
        """
        hub = self._hub
        deadline = time.monotonic() + timeout_s
        hub.check()
        while True:
            self._take_step_frames()
            if self._headers:
                return self._next_header()
            left = deadline - time.monotonic()
            if left <= 0 or hub.take_wake():
                return None
            hub.poll(left)

    def _next_header(self) -> StepHeader:
        header = self._headers.popleft()
        self._next_step = header.step + 1
        self.highest_step = max(self.highest_step, header.step)
        self.highest_epoch = max(self.highest_epoch, header.epoch)
        return header

    def _take_step_frames(self) -> None:
        while self._hub.step_frames:
            step_frame = self._hub.step_frames.popleft()
            try:
                self._file(step_frame)
            except ProtocolError as err:
                self._hub.reject(step_frame.sender.name, str(err))

    def _file(self, step_frame: StepFrame) -> None:
        frame, sender = step_frame.frame, step_frame.sender
        data = frame.payload.data
        if frame.header.kind is FrameKind.PROPOSAL:
            proposal = StepProposal.decode(data)
            self._check_place(frame.header, proposal.generation, proposal.step)
            if not self.is_leader or proposal.rank != sender.rank:
                raise ProtocolError(f"proposal of rank {proposal.rank} from {sender.name}")
            self._take_proposal(proposal)
            return
        header = StepHeader.decode(data)
        self._check_place(frame.header, header.generation, header.step)
        generation = self._hub.generation
        if sender.name != generation.leader.name:
            raise ProtocolError(f"step header from {sender.name}, which does not lead")
        expected = self._headers[-1].step + 1 if self._headers else self._next_step
        if header.step != expected:
            raise ProtocolError(f"step header {header.step}: must be {expected}")
        _check_members(header, generation)
        self._headers.append(header)

    def _check_place(self, frame: FrameHeader, generation: int, step: int) -> None:
        if (generation, step) != (frame.generation, frame.step):
            raise ProtocolError("step message and its frame name different steps")

    def _take_proposal(self, proposal: StepProposal) -> None:
        decided = self._headers[-1].step if self._headers else self._next_step - 1
        if proposal.step <= decided:
            return  # it crossed the header; its rank proposes again after that step
        if proposal.step != decided + 1:
            raise ProtocolError(f"proposal for step {proposal.step}: must be {decided + 1}")
        self._proposals[proposal.rank] = proposal
        if not self._headers:
            self._decide()

    def _decide(self, even_empty: bool = False) -> None:
        """Leader: publish the header of the next step if there is one."""
        generation = self._hub.generation
        ranks = [m.rank for m in generation.attention]
        if any(rank not in self._proposals for rank in ranks):
            return
        self._observe_step()
        decode_rows = sum(self._proposals[rank].decode_rows for rank in ranks)
        header = decide_header(
            self._proposals,
            ranks=ranks,
            generation=generation.number,
            step=self._next_step,
            epoch=self._epoch,
            oldest_epoch=self._oldest_epoch,
            max_prefill_rows=self._prefill_cap.rows(decode_rows, len(ranks)),
            micro_batches=self._micro_batches,
            even_empty=even_empty or self._epoch != self._decided_epoch,
        )
        if header is None:
            return
        self._decided_epoch = header.epoch
        self._proposals.clear()
        for member in generation.members:
            if member.name != self._hub.me.name:
                self._send(member.name, FrameKind.HEADER, header)
        self._headers.append(header)
        self._timed = (header, time.monotonic())

    def _observe_step(self) -> None:
        """Leader: all ranks have proposed again, so the step before is over everywhere."""
        if self._timed is None:
            return
        (header, start), self._timed = self._timed, None
        seconds = time.monotonic() - start
        self._prefill_cap.observe(header.decode_rows, header.prefill_rows, seconds)

    def _send(self, name: str, kind: FrameKind, message: StepProposal | StepHeader) -> None:
        data = message.encode()
        frame = FrameHeader(kind, message.generation, message.step, length=len(data))
        self._hub.send(name, frame, [data])


def _check_members(header: StepHeader, generation: Generation) -> None:
    ranks = [rank for rank, _ in header.grants]
    expected = [m.rank for m in generation.attention]
    if ranks != expected:
        raise ProtocolError(f"step header grants ranks {ranks}: must be {expected}")
