"""Members of a cluster: workers with ranks and addresses, and the generation that they form."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Literal

from cluster.core.arithmetic import ArithmeticAgreement, ArithmeticOffer, agree
from cluster.core.codec import Message

Role = Literal["attention", "expert", "colocated"]
"""Role of a worker. A ``colocated`` worker has both roles, and the same rank in both pools."""


def runs_attention(role: Role) -> bool:
    """Return whether a worker of this role serves requests."""
    return role != "expert"


def holds_experts(role: Role) -> bool:
    """Return whether a worker of this role holds experts."""
    return role != "attention"


class Member(Message, frozen=True, kw_only=True):
    """One worker of a generation."""

    name: str
    """Never reused: a replacement gets a new name (``expert-1``, later ``expert-1.2``)."""
    role: Role
    """Role, which determines the pool; ``colocated`` is in both pools."""
    rank: int
    """Position in its pool (or both pools), constant, and unique within a generation."""
    device: int = -1
    """Index of its device in the placement if it holds experts; else -1."""
    node: str = ""
    """Host name or Ray node id, for display."""
    domain: str = ""
    """Failure domain; empty for the node."""
    link_class: str = ""
    """Link class, whose members have fast links to each other; empty for the node."""
    speed: float = 1.0
    """Relative speed of its device in computing experts."""
    pid: int = 0
    """Process id on its host."""
    data_address: str = ""
    """``host:port`` of the worker's data-plane listener (edges and step channel)."""
    engine_address: str = ""
    """``host:port`` of the engine stream if it runs attention; else empty."""
    weights_address: str = ""
    """``host:port`` from which peers read the weights of its experts; else empty."""
    kv_address: str = ""
    """``host:port`` from which peers read KV blocks if it runs attention; else empty."""
    store_address: str = ""
    """``host:port`` of the rendezvous store if it runs attention (collective transport)."""
    offer: ArithmeticOffer = ArithmeticOffer()
    """Arithmetics that the worker offers."""

    @property
    def runs_attention(self) -> bool:
        """Whether it serves requests, as an attention rank."""
        return runs_attention(self.role)

    @property
    def holds_experts(self) -> bool:
        """Whether it holds experts, as an expert rank."""
        return holds_experts(self.role)


class Generation(Message, frozen=True, kw_only=True):
    """The workers that run steps together. Messages of another generation are ignored."""

    number: int
    """Generation number, 1 for the first; it only grows."""
    members: tuple[Member, ...]
    """All members."""
    agreement: ArithmeticAgreement = ArithmeticAgreement()
    """Arithmetic that the members use."""

    def successor(self, members: Sequence[Member]) -> Generation:
        """Return the next generation. An empty generation 0 precedes the first."""
        former = self.agreement if self.number else None
        agreement = agree({m.name: m.offer for m in members}, former)
        return Generation(number=self.number + 1, members=tuple(members), agreement=agreement)

    @property
    def returns_slots(self) -> bool:
        """Whether expert ranks return an output for each expert slot, as sums would depend on the
        placement."""
        return self.agreement.is_exact and len(self.experts) > 1

    @property
    def attention(self) -> tuple[Member, ...]:
        """All attention ranks, including colocated workers."""
        return tuple(sorted((m for m in self.members if m.runs_attention), key=attrgetter("rank")))

    @property
    def experts(self) -> tuple[Member, ...]:
        """All expert ranks, including colocated workers."""
        return tuple(sorted((m for m in self.members if m.holds_experts), key=attrgetter("rank")))

    def peers_of(self, role: Role) -> tuple[Member, ...]:
        """Return the peers of a worker of this role, by rank: the other pool, or all workers."""
        return self.experts if runs_attention(role) else self.attention

    @property
    def leader(self) -> Member:
        """The lowest attention rank, which decides on steps and sends the step headers."""
        return self.attention[0]


ADDRESS_FIELDS = tuple(name for name in Member.__struct_fields__ if name.endswith("_address"))
"""Names of the address fields, which the worker itself reports."""
NODE_FIELDS = ("domain", "link_class", "speed")
"""Names of the fields that depend on the node. The worker reports them if its node was unknown."""
