"""Members of a cluster: workers with ranks and addresses, and the generation that they form."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Literal

from cluster.core.arithmetic import ArithmeticAgreement, ArithmeticOffer, agree
from cluster.core.codec import Message

LARGE_CLUSTER = 16
"""Number of workers above which texts sum up workers by role, and callers share stats that are up
to a second old."""
Role = Literal["attention", "expert", "colocated"]
"""Role of a worker. A ``colocated`` worker has both roles, and the same rank in both pools."""
StepGroup = Literal["", "decode", "prefill"]
"""Step group of an attention worker: the workers of a group run steps together, with a leader of
their own. Empty if all attention workers run steps together, and for expert workers that serve all
groups."""


def runs_attention(role: Role) -> bool:
    """Return whether a worker of this role serves requests."""
    return role != "expert"


def holds_experts(role: Role) -> bool:
    """Return whether a worker of this role holds weights of experts."""
    return role != "attention"


class Member(Message, frozen=True, kw_only=True):
    """One worker of a generation."""

    name: str
    """Name of the worker, never reused: a replacement gets a new name (``expert-1``, later
    ``expert-1.2``)."""
    role: Role
    """Role, which determines the worker's pool; ``colocated`` is in both pools."""
    rank: int
    """Rank of the worker in its pool (or both pools): constant, and unique within a generation."""
    device: int = -1
    """Index of the worker's device in the expert placement; -1 if it holds no experts."""
    node: str = ""
    """Host name or Ray node id of the worker, for display."""
    domain: str = ""
    """Failure domain of the worker's node; empty: the node is a failure domain of its own."""
    link_class: str = ""
    """Link class of the worker's node: nodes of one class have fast links to each other; empty: the
    node is a link class of its own."""
    group: StepGroup = ""
    """Step group of an attention worker, or of an expert worker that serves only one group."""
    speed: float = 1.0
    """Relative speed of the worker's device in computing experts."""
    pid: int = 0
    """Process id of the worker on its host."""
    data_address: str = ""
    """``host:port`` of the worker's data-plane listener (edges and step channel)."""
    engine_address: str = ""
    """``host:port`` of the engine stream; empty if the worker does not run attention."""
    weights_address: str = ""
    """``host:port`` from which peers read the weights of experts; empty if the worker holds no
    experts."""
    kv_address: str = ""
    """``host:port`` from which peers read KV blocks; empty if the worker does not run attention."""
    store_address: str = ""
    """``host:port`` of torch's rendezvous store for the collective transport; empty with another
    transport, or if the worker does not run attention."""
    offer: ArithmeticOffer = ArithmeticOffer()
    """Arithmetics (ways to compute matrix products) that the worker supports, or why none."""

    @property
    def runs_attention(self) -> bool:
        """Whether the worker serves requests, as an attention rank."""
        return runs_attention(self.role)

    @property
    def holds_experts(self) -> bool:
        """Whether the worker holds weights of experts, as an expert rank."""
        return holds_experts(self.role)

    def nearness(self, other: Member) -> int:
        """Return 2 if both workers are on one node, 1 if they are in one link class, else 0."""
        if self.node == other.node:
            return 2
        return int(self.link_class != "" and self.link_class == other.link_class)


class Generation(Message, frozen=True, kw_only=True):
    """The workers that run steps together, in one or several step groups. Messages of another
    generation are ignored."""

    number: int
    """Generation number: 1 for the first generation, and 1 more for each next one."""
    members: tuple[Member, ...]
    """All workers of the generation."""
    agreement: ArithmeticAgreement = ArithmeticAgreement()
    """Arithmetic (way to compute matrix products) that the members use."""

    def successor(self, members: Sequence[Member]) -> Generation:
        """Return the next generation, with ``members``. An empty generation 0 precedes the
        first."""
        former = self.agreement if self.number else None
        agreement = agree({m.name: m.offer for m in members}, former)
        return Generation(number=self.number + 1, members=tuple(members), agreement=agreement)

    @property
    def returns_slots(self) -> bool:
        """Whether expert ranks return the output of each (row, expert) pair, not a sum per row,
        because sums would depend on the placement."""
        return self.agreement.is_exact and len(self.experts) > 1

    @property
    def attention(self) -> tuple[Member, ...]:
        """All attention ranks, including colocated workers."""
        return tuple(sorted((m for m in self.members if m.runs_attention), key=attrgetter("rank")))

    @property
    def experts(self) -> tuple[Member, ...]:
        """All expert ranks, including colocated workers."""
        return tuple(sorted((m for m in self.members if m.holds_experts), key=attrgetter("rank")))

    @property
    def groups(self) -> tuple[tuple[Member, ...], ...]:
        """The attention ranks of each step group, those that decode first."""
        found: dict[StepGroup, list[Member]] = {}
        for member in self.attention:
            found.setdefault(member.group, []).append(member)
        return tuple(tuple(found[group]) for group in sorted(found))

    @property
    def group_names(self) -> tuple[StepGroup, ...]:
        """The step groups that have attention workers, in the order of ``groups``."""
        return tuple(ranks[0].group for ranks in self.groups)

    def group_of(self, name: str) -> int:
        """Return the index in ``groups`` of an attention worker's step group; 0 for others."""
        ranks = enumerate(self.groups)
        return next((i for i, own in ranks if any(m.name == name for m in own)), 0)

    def peers_of(self, role: Role) -> tuple[Member, ...]:
        """Return the workers with which a worker of this role exchanges rows, by rank: the other
        pool, or all workers if it is colocated."""
        return self.experts if runs_attention(role) else self.attention

    @property
    def leader(self) -> Member:
        """The attention worker with the lowest rank."""
        return self.attention[0]


ADDRESS_FIELDS = tuple(name for name in Member.__struct_fields__ if name.endswith("_address"))
"""Names of the address fields of ``Member``, which the worker itself reports."""
NODE_FIELDS = ("domain", "link_class", "speed")
"""Names of the fields of ``Member`` that depend on the worker's node. The worker reports them if
the controller does not know the node."""
