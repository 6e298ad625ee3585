"""Grammars of arguments that are written one by one.

Strings stand as they are, up to the mark behind a value: of their schemas, ``enum`` and ``const``
are followed, patterns and lengths are not. Other values are JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gateway.core.tool_use import Tool
from gateway.text.forms.argument_values import STRING, argument_schemas, kinds_of
from gateway.text.forms.call_grammar import closed_schema, json_rule, mark, up_to
from gateway.text.forms.call_syntax import PairSyntax, Part, Slot
from gateway.text.forms.schemas import ANY, Schema

BREAK = "BREAK?"
BREAK_RULE = r"BREAK: /[ \n]/"
_TEXT, _NO_TEXT, _EITHER = '"true"', '"false"', '("true" | "false")'
_DEFINITIONS = ("$defs", "definitions")
_OTHER_KEY = r"/[A-Za-z0-9_.$-]{1,64}/"
"""Names of arguments that a schema allows and does not name."""


def written(parts: tuple[Part, ...], mark_ids: Mapping[str, int], slots: Mapping[Slot, str]) -> str:
    """Parts of a call as a grammar has them; ``slots`` are expressions."""
    return " ".join(
        slots[part] if isinstance(part, Slot) else mark(part, mark_ids) for part in parts
    )


@dataclass(frozen=True, slots=True)
class PairRules:
    """Makes the rules of the arguments of each tool."""

    syntax: PairSyntax
    mark_ids: Mapping[str, int]

    def shared(self) -> list[str]:
        """Rules that those of all tools name."""
        return up_to(self._end, self.mark_ids, "value")[1]

    def of(self, tool: Tool, place: int) -> list[str]:
        """The rule ``args_PLACE`` and those that it names."""
        root = closed_schema(tool.parameters)
        required = root.get("required")
        needed = required if isinstance(required, list) else []
        names: list[str] = []
        lines: list[str] = []
        for number, (key, schema) in enumerate(argument_schemas(root).items()):
            rule = f"arg_{place}_{number}"
            lines.append(f"{rule}: {self._pair(key, schema, root, tool.is_strict)}")
            names.append(rule if key in needed else f"{rule}?")
        if root.get("additionalProperties") is not False:
            lines.append(f"other_{place}: {self._any_pair()}")
            names.append(f"other_{place}*")
        close = mark(self.syntax.close, self.mark_ids)
        return [f"args_{place}: {' '.join([*names, BREAK, close])}", *lines]

    def _pair(self, key: str, schema: Schema, root: Mapping[str, Any], is_strict: bool) -> str:
        kinds = kinds_of(schema)
        is_text = STRING in kinds or ANY in kinds
        if schema.values:
            choices = [v if isinstance(v, str) else json.dumps(v) for v in schema.values]
            value = f"({' | '.join(map(json.dumps, choices))}) {self._mark_behind}"
        elif is_text:
            value, _ = up_to(self._end, self.mark_ids, "value")
        else:
            definitions = {name: root[name] for name in _DEFINITIONS if name in root}
            raw = root["properties"][key]
            value = f"{json_rule({**definitions, **raw}, is_strict)} {self._mark_behind}"
        truth = _TEXT if kinds == {STRING} else _EITHER if is_text else _NO_TEXT
        return self._around(json.dumps(key), value, truth)

    def _any_pair(self) -> str:
        value, _ = up_to(self._end, self.mark_ids, "value")
        return self._around(_OTHER_KEY, value, _EITHER)

    def _around(self, key: str, value: str, truth: str) -> str:
        slots = {Slot.KEY: key, Slot.IS_TEXT: truth, Slot.BREAK: BREAK}
        before = written(self.syntax.head, self.mark_ids, slots)
        opening = json.dumps("\n") if self.syntax.has_breaks else ""
        return " ".join(filter(None, [BREAK, before, opening, value]))

    @property
    def _end(self) -> str:
        """Behind a string."""
        return ("\n" if self.syntax.has_breaks else "") + self.syntax.end

    @property
    def _mark_behind(self) -> str:
        """Behind a value that ends by itself."""
        opening = f"{json.dumps(chr(10))} " if self.syntax.has_breaks else ""
        return opening + mark(self.syntax.end, self.mark_ids)
