"""Steps of several step groups on one expert worker, interleaved by exchanges.

    decode group    exchange 1   exchange 2   ..      its rows arrive every few milliseconds
    prefill group        exchange 1        exchange 2 ..      between them

If the rows of several groups have arrived, those of the group that decodes are served first. On
CPUs, they are also served between parts of a large exchange of the other group.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from functools import partial

from cluster.core.topology import Generation
from workers.dispatch.expert_server import ExpertServer
from workers.dispatch.row_serving import Interleaving
from workers.engine.group_channels import GroupChannels
from workers.metrics.activity import Activity
from workers.requests.step_header import StepHeader
from workers.transport.edge import Edge
from workers.transport.peer_connections import PeerConnections
from workers.transport.select_loop import timed_out


class GroupSteps:
    """Serves the steps of all step groups in one data thread, at most one step of each at a time.

    A step begins when its header arrives. Other work of the data thread, such as a new placement,
    is done between two exchanges.
    """

    def __init__(
        self,
        connections: PeerConnections,
        channels: GroupChannels,
        servers: Sequence[ExpertServer],
        activity: Activity,
        *,
        begun: Callable[[int, StepHeader], None],
        ended: Callable[[int], None],
    ) -> None:
        """``begun`` is called before each step with the index of its group and the header,
        ``ended`` after each step with the index.
        """
        self.busy_s = 0.0
        """Seconds in which a step ran."""
        self._connections = connections
        self._channels = channels
        self._servers = servers
        for group, server in enumerate(servers[1:], start=1):
            server.set_interleaving(
                Interleaving(partial(self._runs_before, group), partial(self._serve_before, group))
            )
        self._activity = activity
        self._begun = begun
        self._ended = ended
        self._generation = 0
        self._names: Mapping[int, str] = {}
        self._deadlines: dict[int, float] = {}
        """Monotonic time by which the rows of the next exchange must arrive, by group with a step
        that has begun and not ended."""
        self._is_woken = False
        """Whether other work of the data thread is pending."""
        self._rows: dict[int, int] = {}
        """Number of rows of each step that has begun and not ended, by group."""
        self._busy_since = 0.0

    def enter(self, generation: Generation) -> bool:
        """Forget the steps of the last generation; return False if ``generation`` runs already."""
        if generation.number == self._generation:
            return False
        self._generation = generation.number
        self._names = {member.rank: member.name for member in generation.attention}
        self._deadlines.clear()
        self._rows.clear()
        return True

    def run(self, timeout_s: float) -> None:
        """Serve steps until the data thread is woken, or no step runs after ``timeout_s``.

        Steps that have begun continue in the next call. Raises ``PeerLostError`` and
        ``GenerationChangedError``, and ``ProtocolError`` for an unknown epoch.
        """
        self._is_woken = False
        self._activity.rows = sum(self._rows.values())
        deadline = time.monotonic() + timeout_s
        wait_s = 0.0
        while True:
            is_busy = self._advance(wait_s, len(self._servers))
            left_s = deadline - time.monotonic()
            if self._is_woken or (not self._deadlines and left_s <= 0):
                return
            self._check_deadlines()
            wait_s = 0.0 if is_busy else timeout_s if self._deadlines else left_s

    def _serve_before(self, group: int) -> None:
        """Serve what has arrived for the groups before ``group``, between parts of its exchange."""
        while self._advance(0.0, group):
            pass

    def _runs_before(self, group: int) -> bool:
        """Whether a group before ``group`` runs a step."""
        return min(self._deadlines, default=group) < group

    def _advance(self, wait_s: float, num_groups: int) -> bool:
        """Wait for messages; begin and serve steps of the first ``num_groups`` groups. Returns
        whether there was something to do.
        """
        self._connections.check()  # native code may have lost an edge
        running = (group for group in sorted(self._deadlines) if group < num_groups)
        edges = {group: self._edges(group) for group in running}
        natively = {g for g, own in edges.items() if self._reads_natively(g, own)}
        readable = self._poll(wait_s, {edge for g in natively for edge in edges[g]})
        # What the poll has read comes first: wake-ups, and headers.
        self._is_woken = self._connections.take_wake() or self._is_woken
        has_begun = self._begin_steps(num_groups)
        group = self._next_group(edges, natively, readable, num_groups)
        if group is not None:
            self._serve(group)
        return has_begun or group is not None

    def _begin_steps(self, num_groups: int) -> bool:
        """Begin the steps of idle groups that have a header; return whether there was one."""
        has_begun = False
        pairs = zip(self._channels.channels[:num_groups], self._servers, strict=False)
        for group, (channel, server) in enumerate(pairs):
            while group not in self._deadlines and (header := channel.take()) is not None:
                has_begun = True
                self._begun(group, header)
                if not self._rows:
                    self._busy_since = time.monotonic()
                self._set_rows(group, header.decode_rows + header.prefill_rows)
                server.start_step(header)
                if server.next_ranks:
                    self._await_rows(group)
                else:
                    self._serve(group)
        return has_begun

    def _serve(self, group: int) -> None:
        # A header of a group that comes first must not wait for a step of a later one.
        only_one = group > 0 or len(self._deadlines) > 1
        if not self._servers[group].serve_next(only_one=only_one):
            self._await_rows(group)
            return
        self._deadlines.pop(group, None)
        self._ended(group)
        self._set_rows(group, 0)
        if not self._rows:
            self.busy_s += time.monotonic() - self._busy_since

    def _set_rows(self, group: int, num_rows: int) -> None:
        self._rows.pop(group, None)
        if num_rows:
            self._rows[group] = num_rows
        self._activity.rows = sum(self._rows.values())

    def _await_rows(self, group: int) -> None:
        self._deadlines[group] = time.monotonic() + self._connections.step_timeout_s

    def _next_group(
        self,
        edges: Mapping[int, Sequence[Edge]],
        natively: Set[int],
        readable: set[Edge],
        num_groups: int,
    ) -> int | None:
        """Return the group to serve next; None if no exchange can be served.

        The first group that has all rows comes first. Without one, native code may begin to read
        those of a group if some have arrived; it stops if another group has data.
        """
        if num_groups < len(self._servers):
            natively = natively & {g for g, own in edges.items() if readable.issuperset(own)}
        for group, own in edges.items():
            arrived = readable if group in natively else {edge for edge in own if edge.inbox}
            if arrived.issuperset(own):
                return group
        partly = (g for g, own in edges.items() if g in natively and not readable.isdisjoint(own))
        return next(partly, None)

    def _check_deadlines(self) -> None:
        """Raise ``PeerLostError`` if the rows of an exchange have not arrived in time."""
        now = time.monotonic()
        for group in [group for group, limit in self._deadlines.items() if now > limit]:
            self._poll(0.0, ())
            late = [edge.name for edge in self._edges(group) if not edge.inbox]
            if late:
                raise timed_out(late, f"no rows within {self._connections.step_timeout_s:g} s")

    def _poll(self, wait_s: float, kept: Collection[Edge]) -> set[Edge]:
        """Read what has arrived, except rows on ``kept`` edges; return those with rows."""
        loop, activity = self._connections.loop, self._activity
        if wait_s:
            late = [e.name for g in self._deadlines for e in self._edges(g) if not e.inbox]
            if not self._deadlines:
                late = [name for c in self._channels.channels for name in c.missing_workers()]
            loop.awaited = tuple(dict.fromkeys(late))
            activity.is_waiting, activity.is_idle = bool(self._deadlines), not self._deadlines
        try:
            return {*loop.poll_edges(wait_s, kept)}
        finally:
            loop.awaited = ()
            activity.is_waiting, activity.is_idle = False, False

    def _edges(self, group: int) -> list[Edge]:
        """Return the edges on which the rows of a group's next exchange arrive."""
        edges = self._connections.edges
        return [edges[self._names[rank]] for rank in self._servers[group].next_ranks]

    def _reads_natively(self, group: int, edges: Sequence[Edge]) -> bool:
        """Whether native code will read the rows of a group's next exchange from the sockets."""
        return self._servers[group].reads_sockets and all(edge.is_clear for edge in edges)
