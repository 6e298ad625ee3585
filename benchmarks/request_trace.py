"""Requests of a chat service, with the blocks that they share; see ``data/README.md``."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

BLOCK_TOKENS = 512
"""Tokens of a block."""
_FILE = Path(__file__).parent / "data" / "mooncake_conversation.txt.gz"


@dataclass(frozen=True, slots=True)
class TracedRequest:
    """One request."""

    time_s: float
    """Since the first one."""
    prompt_tokens: int
    """Length of its prompt."""
    blocks: Sequence[int]
    """Names of its prompt's blocks: equal ones hold equal tokens behind equal blocks."""


def conversations() -> list[TracedRequest]:
    """The Mooncake conversation trace, in the order of arrival."""
    lines = gzip.decompress(_FILE.read_bytes()).decode().splitlines()
    return [_request(*line.split(" ")) for line in lines]


def _request(time_ms: str, tokens: str, *runs: str) -> TracedRequest:
    blocks = [block for run in runs for block in _run(run)]
    return TracedRequest(int(time_ms) / 1000, int(tokens), blocks)


def _run(text: str) -> range:
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)
