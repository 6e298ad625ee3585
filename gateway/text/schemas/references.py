"""Resolves the references within one JSON schema.

Source: JSON Schema 2020-12, core, sections 8.2 and 9.2, and draft 7, section 8. Only references
into the same document are supported; no URL is fetched.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urljoin

MAX_SCHEMA_DEPTH = 32
"""Maximum nesting of objects and lists in a JSON schema, without following references."""
MAX_LEVELS = 500
"""Maximum nesting of objects and lists in a JSON schema, with references followed. The grammar
compiler follows references recursively, and its stack suffices for 1,800 levels."""
_MAX_VISITS = 20_000
"""Maximum number of objects and lists in a schema; targets of references are counted separately.
A schema with more counts as too deep."""
_MAX_ID_CHARS = 512
"""Maximum length of the id of a whole schema to which the ids of its parts are relative."""
BY_NAME = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
"""JSON Schema keywords whose values map names to schemas."""
CONTENTS = frozenset({"enum", "const", "default", "examples"})
"""JSON Schema keywords whose values contain no schemas."""
_INDEX = re.compile("[0-9]{1,9}")


@dataclass(frozen=True, slots=True)
class ReferenceTarget:
    """The target of a reference (``$ref``) in a JSON schema."""

    schema: Any
    base: Mapping[str, Any]
    """The schema to which pointers (``#/...``) within ``schema`` are relative."""


class References:
    """Finds the targets of references (``$ref``) within one JSON schema.

    Args:
        root: the whole schema.
    """

    def __init__(self, root: Mapping[str, Any]) -> None:
        self.root = root
        root_id = _text(root.get("$id")) or _text(root.get("id"))
        self._root_id = root_id if len(root_id) <= _MAX_ID_CHARS else ""
        self._by_id: dict[str, ReferenceTarget] | None = None

    def find(self, reference: str, base: Mapping[str, Any] | None = None) -> ReferenceTarget | None:
        """Return the target of a reference, for example ``#/$defs/a%20b`` or ``#name``.

        None if there is no target. ``base`` is the schema to which pointers are relative; None
        means the whole schema.
        """
        base = self.root if base is None else base
        address, _, fragment = reference.partition("#")
        if address:
            target = self._named(address)
            if target is None or not isinstance(target.schema, Mapping):
                return None
            base = target.schema
        fragment = unquote(fragment)
        if not fragment or fragment == "/":
            return ReferenceTarget(base, base)
        if fragment.startswith("/"):
            return self._at(fragment, base)
        return self._named(f"#{fragment}")

    def _at(self, pointer: str, base: Mapping[str, Any]) -> ReferenceTarget | None:
        schema: Any = base
        for step in pointer[1:].split("/"):
            name = step.replace("~1", "/").replace("~0", "~")
            if isinstance(schema, Mapping) and name in schema:
                schema = schema[name]
            elif isinstance(schema, list) and _INDEX.fullmatch(name):
                schema = schema[int(name)] if int(name) < len(schema) else None
            else:
                return None
            base = base_of(schema, base)
        return ReferenceTarget(schema, base) if isinstance(schema, (Mapping, bool)) else None

    def _named(self, address: str) -> ReferenceTarget | None:
        """Find a schema or one of its parts by ``$id`` or, with a leading ``#``, by ``$anchor``."""
        if self._by_id is None:
            self._by_id = dict(self._names())
        targets = self._by_id
        return targets.get(address) or targets.get(_join(self._root_id, address))

    def _names(self) -> Iterator[tuple[str, ReferenceTarget]]:
        waiting: list[tuple[Any, Mapping[str, Any]]] = [(self.root, self.root)]
        visits_left = _MAX_VISITS
        while waiting and visits_left > 0:
            visits_left -= 1
            schema, base = waiting.pop()
            if isinstance(schema, Mapping):
                base = base_of(schema, base)
                for key in ("$id", "id"):
                    if name := _text(schema.get(key)):
                        yield name, ReferenceTarget(schema, base)
                        yield _join(self._root_id, name), ReferenceTarget(schema, base)
                for key in ("$anchor", "$dynamicAnchor"):
                    if name := _text(schema.get(key)):
                        yield f"#{name}", ReferenceTarget(schema, base)
            waiting += (
                (inner, base) for inner in _inner(schema) if isinstance(inner, (Mapping, list))
            )


def base_of(schema: Any, base: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the schema to which pointers within ``schema`` are relative: itself or ``base``."""
    name = _text(schema.get("$id")) if isinstance(schema, Mapping) else ""
    return schema if name and not name.startswith("#") else base


def is_too_deep(references: References) -> bool:
    """Whether a schema's nesting may exceed ``MAX_LEVELS`` if each reference is followed once.

    A path enters a group of schemas that refer to each other (a strongly connected component) once,
    so the sum of the levels in the group is an upper bound.
    """
    graph = _ReferenceGraph(references)
    if graph.visits_left <= 0:
        return True
    longest: dict[int, int] = {}
    for group in graph.components():
        levels = sum(graph.levels[node] for node in group)
        after = (longest[n] for node in group for n in graph.successors[node] if n not in group)
        total = levels + max(after, default=0)
        if total > MAX_LEVELS:
            return True
        longest |= dict.fromkeys(group, total)
    return False


class _ReferenceGraph:
    """Graph of a schema's references. Its nodes are the whole schema and all reference targets."""

    def __init__(self, references: References) -> None:
        self._numbers: dict[int, int] = {}
        self._targets: list[ReferenceTarget] = []
        self._node_of(ReferenceTarget(references.root, references.root))
        self.levels: list[int] = []
        """Number of nesting levels of each node, without following references."""
        self.successors: list[list[int]] = []
        self.visits_left = _MAX_VISITS
        while self.visits_left > 0 and len(self.levels) < len(self._targets):
            self._read(self._targets[len(self.levels)], references)

    def _node_of(self, target: ReferenceTarget) -> int:
        number = self._numbers.setdefault(id(target.schema), len(self._targets))
        if number == len(self._targets):
            self._targets.append(target)
        return number

    def _read(self, target: ReferenceTarget, references: References) -> None:
        deepest, named = 0, []
        waiting: list[tuple[Any, Mapping[str, Any], int]] = [(target.schema, target.base, 1)]
        while waiting and self.visits_left > 0:
            self.visits_left -= 1
            schema, base, depth = waiting.pop()
            deepest = max(deepest, depth)
            base = base_of(schema, base)
            reference = schema.get("$ref") if isinstance(schema, Mapping) else None
            reached = references.find(reference, base) if isinstance(reference, str) else None
            if reached is not None:
                named.append(self._node_of(reached))
            waiting += (
                (inner, base, depth + 1)
                for inner in _inner(schema)
                if isinstance(inner, (Mapping, list))
            )
        self.levels.append(deepest)
        self.successors.append(named)

    def components(self) -> Iterator[set[int]]:
        """Yield the strongly connected components, each after the components that it refers to.

        Source: R. Tarjan, Depth-first search and linear graph algorithms (1972), without recursion.
        """
        order: dict[int, int] = {}
        lowest: dict[int, int] = {}
        open_nodes: list[int] = []
        closed: set[int] = set()
        way = [(0, iter(self.successors[0]))]
        while way:
            node, following = way[-1]
            if node not in order:
                order[node] = lowest[node] = len(order)
                open_nodes.append(node)
            new = None
            for inner in following:
                if inner not in order:
                    new = inner
                    break
                if inner not in closed:
                    lowest[node] = min(lowest[node], order[inner])
            if new is not None:
                way.append((new, iter(self.successors[new])))
                continue
            way.pop()
            if way:
                above = way[-1][0]
                lowest[above] = min(lowest[above], lowest[node])
            if lowest[node] == order[node]:
                index = open_nodes.index(node)
                group = set(open_nodes[index:])
                del open_nodes[index:]
                closed |= group
                yield group


def _inner(schema: Any) -> Iterator[Any]:
    """Yield the schemas, and lists of schemas, directly within a schema."""
    return inner_schemas(schema, CONTENTS)


def inner_schemas(schema: Any, contents: Collection[str]) -> Iterator[Any]:
    """Yield the values directly within a schema or list, except values of keywords ``contents``."""
    if isinstance(schema, list):
        yield from schema
    elif isinstance(schema, Mapping):
        for key, value in schema.items():
            if key in BY_NAME and isinstance(value, Mapping):
                yield from value.values()
            elif key not in contents:
                yield value


def without_keywords(schema: Any, is_unwanted: Callable[[Mapping[str, Any], str], bool]) -> Any:
    """Remove keywords from a schema (or a list of schemas) and from all schemas within it.

    ``is_unwanted(schema, keyword)`` returns whether to remove a keyword.
    """
    if isinstance(schema, list):
        return [without_keywords(one, is_unwanted) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    kept: dict[str, Any] = {}
    for key, value in schema.items():
        if key in BY_NAME and isinstance(value, Mapping):
            kept[key] = {name: without_keywords(one, is_unwanted) for name, one in value.items()}
        elif key in CONTENTS:
            kept[key] = value
        elif not is_unwanted(schema, key):
            kept[key] = without_keywords(value, is_unwanted)
    return kept


def _join(base: str, address: str) -> str:
    """Return the absolute URL of ``address``; ``address`` itself if one of both is no URL."""
    try:
        return urljoin(base, address)
    except ValueError:  # for example of a host in brackets that is not an IPv6 address
        return address


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
