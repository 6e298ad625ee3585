"""Prometheus metrics as plain data, sent from the process that counts to the process that
Prometheus scrapes.

The only module of this folder that imports ``prometheus_client``.
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
"""Metric family as a dict: ``name``, ``text`` (help), ``type`` and ``samples``:
[name, labels, value]."""
_MOST_SERIES = 65_536
"""Maximum number of series whose text is cached, more than most clusters have."""


def new_registry() -> CollectorRegistry:
    """Create an empty Prometheus registry whose metrics have no ``_created`` series."""
    prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
    return CollectorRegistry()


def to_plain(registry: CollectorRegistry | RestrictedRegistry) -> list[PlainFamily]:
    """Return all families of a registry as plain data for ``MergedFamilies``."""
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
    """Metric families of several processes, merged: each family appears once, with ``prefix`` in
    its name."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._families: dict[str, list[str]] = {}

    def add(self, added: Iterable[PlainFamily], **labels: str) -> None:
        """Add the metric families of one process. ``labels`` are added to all samples, or replace
        labels of the same names."""
        for found in added:
            name = self._prefix + found["name"]
            if (lines := self._families.get(name)) is None:
                lines = self._families[name] = [_head(name, found["text"], found["type"])]
            for sample, own_labels, value in found["samples"]:
                series = _series(self._prefix + sample, *own_labels.items(), *labels.items())
                shown = floatToGoString(value)  # type: ignore[no-untyped-call]
                lines.append(f"{series} {shown}\n")

    def render(self) -> bytes:
        """Return the families in Prometheus' text format, in the order in which they were added.

        ``prometheus_client.generate_latest`` would check and escape every name and label again in
        each scrape, and block the gateway's event loop five times as long.
        """
        return "".join(line for lines in self._families.values() for line in lines).encode()


def _head(name: str, text: str, kind: str) -> str:
    """Return the ``HELP`` and ``TYPE`` lines before a family's samples."""
    shown = f"{name}_total" if kind == "counter" else name
    escaped = text.replace("\\", "\\\\").replace("\n", "\\n")
    return f"# HELP {shown} {escaped}\n# TYPE {shown} {kind}\n"


@lru_cache(maxsize=_MOST_SERIES)
def _series(name: str, *labels: tuple[str, str]) -> str:
    """Return a sample's name with sorted labels as text; of two labels with one name, the last is
    used."""
    distinct = sorted(dict(labels).items())
    escaped = (f'{label}="{_escaped(value)}"' for label, value in distinct)
    return f"{name}{{{','.join(escaped)}}}" if labels else name


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
