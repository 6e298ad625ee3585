"""Rules for one worker's edges (connections to workers), from the membership of a generation."""

from __future__ import annotations

from collections.abc import Collection

from cluster.core.topology import Generation, Member, Role, holds_experts, runs_attention
from workers.transport.frames import FrameKind
from workers.transport.handshake import PeerIdentity


class EdgeRules:
    """Decides which workers share an edge, which side opens it, and which frames it may carry.

    Attention rank i opens the edges to every expert worker and to the attention ranks below i.
    Expert workers share no edges with each other.
    """

    def __init__(self, me: PeerIdentity) -> None:
        self._me = me
        self._number = 0
        self._members: dict[str, Member] = {}

    def begin_generation(self, generation: Generation) -> frozenset[str]:
        """Set the membership; return the names of the workers to which this worker has an edge."""
        has_attention = runs_attention(self._me.role)
        self._number = generation.number
        self._members = {
            member.name: member
            for member in generation.members
            if member.name != self._me.name and (member.runs_attention or has_attention)
        }
        return frozenset(self._members)

    def missing(self, open_edges: Collection[str]) -> list[Member]:
        """Return the members to which this worker must have an edge but has none.

        ``open_edges``: worker names of the open edges.
        """
        return [m for m in self._members.values() if m.name not in open_edges]

    def opens(self, member: Member) -> bool:
        """Whether this worker, not the other side, opens the edge to ``member``."""
        is_below = not member.runs_attention or member.rank < self._me.rank
        return runs_attention(self._me.role) and is_below

    def is_member(self, peer: PeerIdentity) -> bool:
        """Whether ``peer`` is a member of the generation to which this worker has an edge.

        Its role and rank must be equal to the member's.
        """
        member = self._members.get(peer.name)
        return member is not None and (member.role, member.rank) == (peer.role, peer.rank)

    def refusal(self, peer: PeerIdentity) -> str | None:
        """Return why the listener refuses a peer that has proved the token, or None."""
        me, number = self._me, self._number
        if peer.generation < number:
            return f"generation of {peer.name} is {peer.generation}, {me.name} is in {number}"
        if not runs_attention(peer.role) or peer.name == me.name:
            return f"{peer.name} must not connect to {me.name}"
        if peer.generation == number and not self.is_member(peer):
            return f"{peer.name} rank {peer.rank} is not a member of generation {number}"
        return None

    def kinds_from(self, sender: Role) -> frozenset[FrameKind]:
        """Return the kinds of frames that a worker of role ``sender`` may send to this worker."""
        kinds: set[FrameKind] = set()
        if runs_attention(sender):
            kinds.add(FrameKind.HEADER)
            if runs_attention(self._me.role):
                kinds.add(FrameKind.PROPOSAL)
            if holds_experts(self._me.role):
                kinds.add(FrameKind.ROWS)
        if holds_experts(sender) and runs_attention(self._me.role):
            kinds.add(FrameKind.OUTPUTS)
        return frozenset(kinds)
