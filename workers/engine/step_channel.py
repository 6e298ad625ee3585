"""Messages by which all ranks agree on the next step: proposals to the leader, headers from it.

    attention worker                          expert worker
    channel.propose(rows)
    header = channel.wait(timeout)            header = channel.wait(timeout)
    run the step                              serve the step

Without work, all ranks are blocked in ``wait``. If a rank receives a request, the receiving thread
calls ``connections.wake()``. ``wait`` then returns None, the rank proposes again for the same step,
and the leader sends the header. If the leader sent this header before the new proposal, the rank
takes part in the step without rows and proposes for the next step.

In a large cluster, messages take the way of a tree (``step_tree``): a worker with children sends
headers on to them, and sends their proposals to its parent together with its own.
"""

from __future__ import annotations

import time
from collections import deque

from cluster.core.errors import ProtocolError
from cluster.core.topology import Generation
from workers.engine.step_leader import StepLeader
from workers.engine.step_proposals import PROPOSALS, ProposalTable, StepProposal, StepProposals
from workers.engine.step_tree import StepTree
from workers.requests.step_header import HEADERS, StepHeader, pack
from workers.scheduling.step_plan import RowsWanted
from workers.transport.edge import StepFrame
from workers.transport.frames import FrameHeader, FrameKind
from workers.transport.peer_connections import PeerConnections

_PARTIAL_S = 0.05
"""Seconds after which a worker sends proposals on although some of its children have not proposed,
so that the leader knows which ranks are missing."""


class StepChannel:
    """Sends a worker's proposals to the leader, and receives step headers. Data thread only."""

    def __init__(
        self, connections: PeerConnections, leader: StepLeader, group: int | None = None
    ) -> None:
        """``leader`` decides the headers while this worker has the lowest attention rank of its
        step group. ``group``: index in ``Generation.groups``, by default the group of the worker.
        """
        self._connections = connections
        self._leader = leader
        self._group = group
        self.highest_step = 0
        """Highest step number of all headers received, in any generation; 0 before the first."""
        self.last_rows = 0
        """Number of rows of all ranks in the newest header; 0 at the start of a generation."""
        self.highest_epoch = 0
        """Highest placement epoch of all headers received; 0 before the first header."""
        self._next_step = 1
        self._headers: deque[StepHeader] = deque()
        self._is_timed = True
        self._begin(connections.generation)

    def _begin(self, generation: Generation) -> None:
        me = self._connections.me
        group = generation.group_of(me.name) if self._group is None else self._group
        members = generation.groups[group] if group < len(generation.groups) else ()
        self._names = {m.rank: m.name for m in members}
        self._tree = tree = StepTree.of(generation, me.name, group)
        self._frames = self._connections.step_frames(self._group or 0)
        ranks = [rank for below in tree.ranks_below.values() for rank in below]
        own = [me.rank] if me.name in self._names.values() else []
        self._table = ProposalTable(sorted((*own, *ranks)))
        """Newest proposals of this rank, and of those below it in the tree."""
        self._all_ranks = pack(sorted(self._names))
        self._unsettled: set[str] = set()
        """Children that have not reported that the newest header has arrived below them."""
        self._has_reported = True
        """Whether the parent knows that the newest header has arrived below this worker."""
        self._send_at: float | None = None
        """Monotonic time at which to send proposals on even if some are missing; None if the parent
        has received all that are known."""

    @property
    def has_header(self) -> bool:
        """Whether ``wait`` would return a header without waiting."""
        return bool(self._headers)

    @property
    def is_leader(self) -> bool:
        """Whether this worker is the leader of the current generation, which decides headers."""
        return self._tree.leader == self._connections.me.name

    @property
    def depth(self) -> int:
        """Number of messages by which a header comes from the leader; see ``StepTree.depth``."""
        return self._tree.depth

    @property
    def is_wanted(self) -> bool:
        """Whether this rank, or one below it in the tree, has proposed rows for the next step."""
        return any(proposal.num_rows for proposal in self._table.in_order)

    @property
    def is_settled(self) -> bool:
        """Whether the hosts of all workers below this one in the tree have received the newest
        header. False may be outdated by ``path_watch.LOOK_S``."""
        return not self._unsettled and self._connections.is_settled

    @property
    def awaits_settling(self) -> bool:
        """Whether this worker must tell its parent that the header has arrived below it."""
        return not self._has_reported

    def missing_workers(self) -> list[str]:
        """Return the names of the workers that must send a message before the next step starts.

        These are attention ranks, this one or below it in the tree, without a proposal; else the
        parent in the tree.
        """
        missing = self._table.missing()
        if self._tree.parent and (not self._tree.ranks_below or not missing):
            return [self._tree.parent]
        return [self._names[rank] for rank in missing]

    def start_generation(self, first_step: int, epoch: int) -> None:
        """Drop all state of the old generation; the next step is ``first_step``.

        Call it after ``connections.apply_generation``. ``epoch`` is the authoritative placement
        epoch, which the leader puts into its headers.
        """
        self._next_step = first_step
        self.last_rows = 0
        self._headers.clear()
        self._begin(self._connections.generation)
        self._leader.start_generation(self._connections.generation, epoch)

    def set_epoch(self, epoch: int, oldest_epoch: int) -> None:
        """Set the placement epoch that the leader puts into the next headers.

        After a change of the epoch, the leader sends the next header when all ranks have proposed,
        even if no rank wants a row. ``oldest_epoch``: the oldest epoch that steps may still use.
        """
        self._leader.set_epoch(epoch, oldest_epoch)

    def propose(self, rows: RowsWanted, *, even_empty: bool = False, is_timed: bool = True) -> None:
        """Propose this attention rank's rows for the next step, replacing its earlier proposal.

        ``even_empty``, on the leader: start a step once all ranks have proposed, even if no rank
        has rows. ``is_timed``, on the leader: whether the time since the last header is that of one
        step. No effect if the header of the next step has arrived. Raises the errors of
        ``PeerConnections.send``.
        """
        self._is_timed = is_timed
        self._take_step_frames()
        if not self._headers:  # else the step is already decided; the rank proposes again after it
            self._table.put((StepProposal.of(self._connections.me.rank, rows),))
            self._pass_on(even_empty)

    def take(self) -> StepHeader | None:
        """Return the next header if it has arrived, else None. Raises ``PeerLostError``."""
        self._take_step_frames()
        return self._next_header() if self._headers else None

    def wait(self, timeout_s: float) -> StepHeader | None:
        """Wait for the next header; None after ``timeout_s`` or after ``connections.wake``.

        Raises ``PeerLostError`` and ``GenerationChangedError``.
        """
        connections = self._connections
        connections.check()
        self._take_step_frames()
        if self._headers:
            return self._next_header()
        deadline = time.monotonic() + timeout_s
        with connections.awaiting():
            while (now := time.monotonic()) < deadline and not connections.take_wake():
                if self._send_at is not None and now >= self._send_at:
                    self._send_proposals()
                connections.loop.awaited = tuple(self.missing_workers())
                connections.poll(min(deadline, self._send_at or deadline) - now)
                self._take_step_frames()
                if self._headers:
                    return self._next_header()
        return None

    def _next_header(self) -> StepHeader:
        header = self._headers.popleft()
        self._next_step = header.step + 1
        self.last_rows = header.decode_rows + header.prefill_rows
        self.highest_step = max(self.highest_step, header.step)
        self.highest_epoch = max(self.highest_epoch, header.epoch)
        return header

    def _take_step_frames(self) -> None:
        while self._frames:
            step_frame = self._frames.popleft()
            try:
                self._handle_step_frame(step_frame)
            except ProtocolError as err:
                self._connections.reject(step_frame.sender.name, str(err))

    def _handle_step_frame(self, step_frame: StepFrame) -> None:
        frame, sender = step_frame.frame, step_frame.sender.name
        data = frame.payload.data
        if frame.header.kind is FrameKind.PROPOSAL:
            proposals = PROPOSALS.decode(data)
            self._check_step(frame.header, proposals.generation, proposals.step)
            ranks = [proposal.rank for proposal in proposals.proposals]
            below = self._tree.ranks_below.get(sender)
            if below is None or not below.issuperset(ranks):
                raise ProtocolError(f"proposals of ranks {ranks} from {sender}")
            self._take_proposals(proposals, sender)
            return
        header = HEADERS.decode(data)
        self._check_step(frame.header, header.generation, header.step)
        if sender != self._tree.parent:
            raise ProtocolError(f"step header from {sender}: must be from {self._tree.parent}")
        if header.step != self._decided_step + 1:
            raise ProtocolError(f"step header {header.step}: must be {self._decided_step + 1}")
        if header.grants.ranks != self._all_ranks:
            granted = [*header.grants.positions]
            raise ProtocolError(f"step header grants ranks {granted}: must be {[*self._names]}")
        self._take_header(header, bytes(data) if self._tree.children else b"")

    @property
    def _decided_step(self) -> int:
        """Number of the newest step with a known header."""
        return self._headers[-1].step if self._headers else self._next_step - 1

    def _check_step(self, frame: FrameHeader, generation: int, step: int) -> None:
        if (generation, step) != (frame.generation, frame.step):
            raise ProtocolError("a step message and its frame have different steps")

    def _take_proposals(self, proposals: StepProposals, child: str) -> None:
        next_step = self._decided_step + 1
        if proposals.step < next_step:
            return  # sent before the header arrived; the ranks propose again after that step
        if proposals.step != next_step:
            raise ProtocolError(f"proposal for step {proposals.step}: must be {next_step}")
        has_news = self._table.put(proposals.proposals)
        if proposals.is_settled and child in self._unsettled:
            self._unsettled.discard(child)
            has_news = True
        if has_news:
            self._pass_on()

    def _pass_on(self, even_empty: bool = False) -> None:
        """Send proposals to the parent, or on the leader decide a header, when all are known."""
        if not self.is_leader:
            if self._table.is_complete:
                self._send_proposals()
            elif self._send_at is None:
                self._send_at = time.monotonic() + _PARTIAL_S
            return
        if self._headers or not self._table.is_complete:
            return
        header = self._leader.decide(
            self._table, self._next_step, even_empty=even_empty, is_timed=self._is_timed
        )
        if header is not None:
            self._take_header(header, HEADERS.encode(header))

    def _send_proposals(self) -> None:
        self._send_at = None
        self._has_reported = self._has_reported or self.is_settled
        proposals = StepProposals(
            generation=self._connections.generation.number,
            step=self._decided_step + 1,
            proposals=tuple(self._table.in_order),
            is_settled=self._has_reported,
        )
        data = PROPOSALS.encode(proposals)
        self._send(self._tree.parent, FrameKind.PROPOSAL, proposals, data)

    def _take_header(self, header: StepHeader, data: bytes) -> None:
        """Queue a header, and send it to the children. ``data``: the encoded header."""
        self._table.clear()
        self._send_at = None
        self._unsettled = set(self._tree.inner)
        self._has_reported = not (self._tree.parent and self._tree.children)
        for child in self._tree.children:
            self._send(child, FrameKind.HEADER, header, data)
        self._headers.append(header)

    def _send(
        self, name: str, kind: FrameKind, message: StepProposals | StepHeader, data: bytes
    ) -> None:
        frame = FrameHeader(kind, message.generation, message.step, length=len(data))
        self._connections.send(name, frame, [data])
