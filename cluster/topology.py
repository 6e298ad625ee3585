"""Who takes part: workers, their ranks and addresses, and the generation they form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Role = Literal["attention", "expert"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One worker of a generation."""

    name: str
    """Unique for ever: a replacement gets a new name (``expert-1``, later ``expert-1.2``)."""
    role: Role
    """Pool."""
    rank: int
    """Place in its pool for as long as it lives; a rank is not reused within a generation."""
    device: int = -1
    """Expert workers: the device index in the placement; -1 for attention workers."""
    node: str = ""
    """Host name or Ray node id, for people."""
    pid: int = 0
    """Process id on that host."""
    data_address: str = ""
    """``host:port`` of the worker's data-plane listener (edges and step channel)."""
    engine_address: str = ""
    """``host:port`` of an attention worker's engine stream; empty for expert workers."""
    store_address: str = ""
    """``host:port`` of an attention worker's rendezvous store (collective transport only)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """A membership. ``number`` only grows; a message of another generation is not for us."""

    number: int
    """Generation number, 1 for the first."""
    members: tuple[Member, ...]
    """All workers that take part."""

    @property
    def attention(self) -> tuple[Member, ...]:
        """Attention workers by rank."""
        return tuple(sorted((m for m in self.members if m.role == "attention"), key=_rank))

    @property
    def experts(self) -> tuple[Member, ...]:
        """Expert workers by rank."""
        return tuple(sorted((m for m in self.members if m.role == "expert"), key=_rank))

    @property
    def leader(self) -> Member:
        """The lowest attention rank: it publishes the step headers."""
        return self.attention[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the control sockets."""
        return {"number": self.number, "members": [asdict(m) for m in self.members]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Generation:
        """Inverse of ``to_dict``."""
        members = tuple(Member(**m) for m in data["members"])
        return cls(number=int(data["number"]), members=members)


def _rank(member: Member) -> int:
    return member.rank
