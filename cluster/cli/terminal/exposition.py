"""Reads series of a Prometheus exposition. Imports only the standard library, to start fast."""

from __future__ import annotations

import re
from collections.abc import Iterator

from cluster.config.gateway import VLLM_PREFIX

_LABEL = re.compile(r'(\w+)="([^"]*)"')


def read_series(text: str, names: str) -> Iterator[tuple[str, dict[str, str], float]]:
    """Yield name, labels and value of the series whose names match the pattern ``names``.

    The names have any prefix (``serve --metrics-prefix``), which is left out. Series under vLLM's
    names are skipped if the same ones have another prefix, too.
    """
    found = re.findall(rf"^([\w:]*?)({names})\{{(.*)\}} (\S+)$", text, re.M)
    has_own = any(prefix != VLLM_PREFIX for prefix, *_ in found)
    for prefix, name, labels, value in found:
        if not has_own or prefix != VLLM_PREFIX:
            yield name, dict(_LABEL.findall(labels)), float(value)
