"""Traces of chat services: requests and the blocks that they share; see ``data/README.md``."""

from __future__ import annotations

import gzip
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

BLOCK_TOKENS = 512
"""Tokens of a block."""
_FOLDER = Path(__file__).parents[1] / "data"


@dataclass(frozen=True, slots=True)
class TracedRequest:
    """One request."""

    time_s: float
    """Seconds since the first request."""
    prompt_tokens: int
    """Length of the prompt in tokens."""
    blocks: Sequence[int]
    """Names of the prompt's blocks; equal names mean equal tokens after equal blocks."""


def conversations() -> list[TracedRequest]:
    """The Mooncake conversation trace, in the order of arrival."""
    return [_request(*line.split(" ")) for line in _lines("mooncake_conversation.txt.gz")]


@dataclass(frozen=True, slots=True)
class Arrival:
    """Lengths and arrival time of one request."""

    time_s: float
    """Seconds since the first request."""
    prompt_tokens: int
    output_tokens: int


def mooncake_arrivals() -> list[Arrival]:
    """The requests of ``conversations`` with the lengths of their outputs."""
    outputs = map(int, _lines("mooncake_conversation_outputs.txt.gz"))
    return [
        Arrival(request.time_s, request.prompt_tokens, tokens)
        for request, tokens in zip(conversations(), outputs, strict=True)
    ]


def azure_arrivals() -> list[Arrival]:
    """The Azure conversation trace of 2023, in the order of arrival."""
    rows = (map(int, line.split(" ")) for line in _lines("azure_conversation.txt.gz"))
    return [Arrival(time_ms / 1000, prompt, output) for time_ms, prompt, output in rows]


def multi_turn(
    seed: int, num_requests: int, *, mean_turns: float = 4.0, rate_per_s: float = 3.0
) -> list[TracedRequest]:
    """Generate multi-turn chats, in the order of arrival.

    Chats begin at random, with one of 20 system prompts (a few of them popular), and bring a first
    message of 1 to 20 blocks or, one in ten, a document of up to 100. After half a minute to some
    minutes the next turn comes, with an answer and a question more.
    """
    draw = random.Random(seed)
    systems = [[10**9 + 100 * i + k for k in range(draw.randint(1, 8))] for i in range(20)]
    popularity = [1 / (i + 1) for i in range(20)]
    found: list[TracedRequest] = []
    start_s, next_block = 0.0, 0
    while len(found) < num_requests:
        start_s += draw.expovariate(rate_per_s / mean_turns)
        time_s, blocks = start_s, list(draw.choices(systems, popularity)[0])
        more = draw.randint(20, 100) if draw.random() < 0.1 else draw.randint(1, 20)
        while True:
            blocks += range(next_block, next_block := next_block + more)
            tokens = len(blocks) * BLOCK_TOKENS - draw.randrange(BLOCK_TOKENS)
            found.append(TracedRequest(round(time_s, 3), tokens, tuple(blocks)))
            if draw.random() < 1 / mean_turns:
                break
            time_s += draw.lognormvariate(4.3, 0.8)
            blocks.pop()  # its last block was not full
            more = draw.randint(2, 5)
    return sorted(found, key=lambda request: request.time_s)[:num_requests]


def _lines(name: str) -> list[str]:
    return gzip.decompress((_FOLDER / name).read_bytes()).decode().splitlines()


def _request(time_ms: str, tokens: str, *runs: str) -> TracedRequest:
    blocks = [block for run in runs for block in _run(run)]
    return TracedRequest(int(time_ms) / 1000, int(tokens), blocks)


def _run(text: str) -> range:
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)
