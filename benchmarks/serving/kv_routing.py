"""Multi-turn chats on two attention workers, routed by prefix (`kv`) and by round-robin.

Two clusters of 2 attention workers and 1 expert worker, one for each policy, run in turns. The
client uses the gateway's router, without HTTP. A chat's context grows with each turn; all chats
send their turns at the same time. First turns do not count, as no worker has cached them. The KV
cache of a worker (128 MiB) holds 8,000 tokens of the random model: enough for half of the chats.
"""

from __future__ import annotations

import random
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass

from benchmarks.checkpoints.random_checkpoint import RandomModel
from benchmarks.harness.systems import running
from benchmarks.report.quiet import wait_until_quiet
from benchmarks.report.results import table
from benchmarks.serving.throughput import TINY, random_model

SYSTEMS = {"ray-kv": "`kv`", "ray-round-robin": "`round-robin`"}
"""Name in ``child.SYSTEMS`` -> label in the table."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """Sizes of the measurement."""

    first_tokens: tuple[int, int] = (1000, 2700)
    """Shortest and longest context of a chat's first turn."""
    more_tokens: int = 100
    """Tokens that each turn adds to the context."""
    turns: int = 4
    """Turns of a chat."""
    num_chats: int = 5
    """Chats at the same time: an odd number, so that round-robin changes their workers."""
    rounds: int = 4
    """Sets of chats on each cluster."""
    new_tokens: int = 8
    """Output tokens of a turn."""
    patience_s: float = 10.0
    """Longest wait before a set of chats for other processes to be quiet."""


QUICK = Case(first_tokens=(40, 60), more_tokens=20, turns=2, num_chats=1, rounds=1, patience_s=0.0)
"""Enough to see that everything runs."""


def section(quick: bool) -> str:
    """Return the Markdown section."""
    case, model = (QUICK, TINY) if quick else (Case(), RandomModel())
    found = measure(case, model)
    base = statistics.median(found["ray-round-robin"])
    rows = [
        [
            SYSTEMS[name],
            f"{statistics.median(times) * 1e3:.0f}",
            f"{statistics.quantiles(times, n=10)[8] * 1e3:.0f}" if len(times) > 1 else "-",
            f"{base / statistics.median(times):.2f}",
        ]
        for name, times in found.items()
    ]
    words = (
        f"Each policy serves {case.rounds} sets of {case.num_chats} chats with {case.turns} turns. "
        f"A chat begins with {case.first_tokens[0]:,} to {case.first_tokens[1]:,} tokens and grows "
        f"by {case.more_tokens} a turn. The model is a random OLMoE (hidden {model.hidden}, "
        f"{model.layers} layers, {model.experts} experts)."
    )
    head = ["routing policy", "TTFT, median, ms", "TTFT, p90, ms", "speed-up over round-robin"]
    about = " ".join((__doc__ or "").split())
    return "\n\n".join(["## Routing by prefix", f"{about} {words}", table(head, rows)])


def measure(case: Case, model: RandomModel) -> dict[str, list[float]]:
    """System -> seconds to the first token of each turn except the first."""
    found: defaultdict[str, list[float]] = defaultdict(list)
    with random_model(model) as checkpoint, running(list(SYSTEMS), checkpoint) as systems:
        for number in range(case.rounds + 1):
            for name in SYSTEMS:
                wait_until_quiet(time.monotonic() + case.patience_s)
                draw = random.Random(number)
                chats: list[list[int]] = [[] for _ in range(case.num_chats)]
                for turn in range(case.turns if number else 1):  # the first set warms up
                    for chat in chats:
                        tokens = case.more_tokens if turn else draw.randint(*case.first_tokens)
                        chat += [draw.randrange(4, 256) for _ in range(tokens)]
                    times = systems[name].generate(chats, case.new_tokens)
                    if turn:
                        found[name] += [own[0] for own in times]
    return dict(found)
