"""Pages of long lists, and answers with one JSON object."""

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
Listed = TypeVar("Listed")


@dataclass(frozen=True, slots=True)
class Page:
    """Which part of a list a client wants."""

    limit: int
    after: str | None
    """The id before the first one."""
    order: Order
    """By time."""

    @classmethod
    def of(cls, query: Mapping[str, str], most: int, default: int) -> Self:
        """From the query of a URL: ``limit`` (1 to ``most``), ``after``, ``order``.

        Raises ``RequestError``.
        """
        order, limit = query.get("order", "desc"), query.get("limit", str(default))
        require(order in ("asc", "desc"), "order", f"({order[:32]!r}) must be asc or desc")
        is_number = limit.isascii() and limit.isdecimal() and len(limit) <= len(str(most))
        rule = f"({limit[:32]!r}) must be a whole number from 1 to {most}"
        require(is_number and 1 <= int(limit) <= most, "limit", rule)
        return cls(int(limit), query.get("after"), cast(Order, order))

    def ordered(
        self, found: Sequence[Listed], id_of: Callable[[Listed], str] = str
    ) -> Sequence[Listed]:
        """Of entries from the oldest to the newest those from the page's begin on.

        ``id_of`` gives the id of an entry; entries may be ids. Raises ``RequestError`` where
        ``after`` is none of them.
        """
        entries = list(found) if self.order == "asc" else list(reversed(found))
        if self.after is None:
            return entries
        ids = list(map(id_of, entries))
        rule = f"({self.after[:64]!r}) is not the id of one of them"
        require(self.after in ids, "after", rule)
        return entries[ids.index(self.after) + 1 :]

    def read(
        self, ids: Sequence[str], read: Callable[[str], Mapping[str, Any] | None]
    ) -> dict[str, Any]:
        """The page of the objects that have these ids, from the oldest to the newest.

        ``read`` returns None for one that is not there any more, or not to be listed.
        """
        present = (one for one in map(read, self.ordered(ids)) if one is not None)
        return self.document(list(islice(present, self.limit + 1)))

    def document(self, found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The page of what was found, which may be more."""
        data = found[: self.limit]
        return {
            "object": "list",
            "data": data,
            "first_id": data[0]["id"] if data else None,
            "last_id": data[-1]["id"] if data else None,
            "has_more": len(found) > self.limit,
        }


def json_response(content: object) -> Response:
    """An answer with one JSON document; ``content`` may be bytes that are JSON already."""
    raw = content if isinstance(content, bytes) else dump_json(content)
    return Response(raw, media_type="application/json")


def tenant() -> str:
    """Whose objects the running request means: its key's; without keys there is one owner."""
    caller = CALLER.get()
    return "" if caller is None else caller.entry.tenant
