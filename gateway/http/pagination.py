"""Pagination of lists, and JSON responses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, Self, TypeVar, cast

from starlette.responses import Response

from gateway.auth.auth import CALLER
from gateway.core.field_checks import require
from gateway.http.json_output import dump_json

Order = Literal["asc", "desc"]
Entry = TypeVar("Entry")


@dataclass(frozen=True, slots=True)
class Page:
    """The pagination parameters of a list request."""

    limit: int
    after: str | None
    """Id of the entry that precedes the page; None starts at the first entry."""
    order: Order
    """Sort order by creation time."""

    @classmethod
    def from_query(cls, query: Mapping[str, str], max_limit: int, default: int) -> Self:
        """Read ``limit`` (1 to ``max_limit``), ``after`` and ``order`` from the query of a URL.

        Raises ``RequestError`` for an invalid value.
        """
        order, limit = query.get("order", "desc"), query.get("limit", str(default))
        require(order in ("asc", "desc"), "order", f"({order[:32]!r}) must be asc or desc")
        is_number = limit.isascii() and limit.isdecimal() and len(limit) <= len(str(max_limit))
        rule = f"({limit[:32]!r}) must be a whole number from 1 to {max_limit}"
        require(is_number and 1 <= int(limit) <= max_limit, "limit", rule)
        return cls(int(limit), query.get("after"), cast(Order, order))

    def select(
        self, oldest_first: Sequence[Entry], id_of: Callable[[Entry], str] = str
    ) -> Sequence[Entry]:
        """Sort the entries by ``order``; drop those up to and including the one with id ``after``.

        ``id_of`` returns the id of an entry; by default the entries are ids. Raises
        ``RequestError`` if no entry has the id ``after``.
        """
        entries = list(oldest_first) if self.order == "asc" else list(reversed(oldest_first))
        if self.after is None:
            return entries
        ids = list(map(id_of, entries))
        rule = f"({self.after[:64]!r}) must be the id of an entry of the list"
        require(self.after in ids, "after", rule)
        return entries[ids.index(self.after) + 1 :]

    def read(
        self, ids: Sequence[str], read: Callable[[str], Mapping[str, Any] | None]
    ) -> dict[str, Any]:
        """Read the objects ``ids``, given oldest first, and return the response body of the page.

        ``read`` returns None for an object that no longer exists or must not be listed.
        """
        present = (one for one in map(read, self.select(ids)) if one is not None)
        return self.to_body(list(islice(present, self.limit + 1)))

    def to_body(self, entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the body with the first ``limit`` entries. Further ones only set ``has_more``."""
        data = entries[: self.limit]
        return {
            "object": "list",
            "data": data,
            "first_id": data[0]["id"] if data else None,
            "last_id": data[-1]["id"] if data else None,
            "has_more": len(entries) > self.limit,
        }


def json_response(content: object) -> Response:
    """Return a JSON response; ``content`` may be bytes that are JSON already."""
    raw = content if isinstance(content, bytes) else dump_json(content)
    return Response(raw, media_type="application/json")


def current_tenant() -> str:
    """Return the tenant of the current request's API key; empty if no keys are configured."""
    caller = CALLER.get()
    return "" if caller is None else caller.entry.tenant
