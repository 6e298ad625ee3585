"""Prometheus metrics as plain data, on their way from the process that counts to the one scraped.

It imports ``prometheus_client``; nothing else in this folder does.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import prometheus_client
from prometheus_client import CollectorRegistry
from prometheus_client.registry import RestrictedRegistry
from prometheus_client.utils import floatToGoString

PlainFamily = dict[str, Any]
"""``name``, ``text`` (help), ``type`` and ``samples``: [name, labels, value]."""
_MOST_SERIES = 16_384
"""Series whose text is kept: more than a cluster has, unless it shows every expert."""


def new_registry() -> CollectorRegistry:
    """An empty registry whose metrics have no ``_created`` series."""
    prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
    return CollectorRegistry()


def to_plain(registry: CollectorRegistry | RestrictedRegistry) -> list[PlainFamily]:
    """All families of a registry, which ``MergedFamilies`` reads."""
    return [
        {
            "name": family.name,
            "text": family.documentation,
            "type": family.type,
            "samples": [[s.name, dict(s.labels), s.value] for s in family.samples],
        }
        for family in registry.collect()
    ]


class MergedFamilies:
    """Plain families of several processes, each family once; all names get ``prefix``."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._families: dict[str, list[str]] = {}

    def add(self, added: Iterable[PlainFamily], **labels: str) -> None:
        """Add families of one process, whose samples get more labels, or others of these names."""
        for found in added:
            name = self._prefix + found["name"]
            if (lines := self._families.get(name)) is None:
                lines = self._families[name] = [_head(name, found["text"], found["type"])]
            for sample, own_labels, value in found["samples"]:
                series = _series(self._prefix + sample, *own_labels.items(), *labels.items())
                shown = floatToGoString(value)  # type: ignore[no-untyped-call]
                lines.append(f"{series} {shown}\n")

    def render(self) -> bytes:
        """The families in the order in which they were added, in Prometheus' text format.

        ``prometheus_client.generate_latest`` checks and escapes each name and label of each scrape
        again, and takes five times as long, in the gateway's event loop.
        """
        return "".join(line for lines in self._families.values() for line in lines).encode()


def _head(name: str, text: str, kind: str) -> str:
    """The lines before a family's samples."""
    shown = f"{name}_total" if kind == "counter" else name
    escaped = text.replace("\\", "\\\\").replace("\n", "\\n")
    return f"# HELP {shown} {escaped}\n# TYPE {shown} {kind}\n"


@lru_cache(maxsize=_MOST_SERIES)
def _series(name: str, *labels: tuple[str, str]) -> str:
    """A sample's name and labels, sorted; of two labels with one name the last counts."""
    distinct = sorted(dict(labels).items())
    escaped = (f'{label}="{_escaped(value)}"' for label, value in distinct)
    return f"{name}{{{','.join(escaped)}}}" if labels else name


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
