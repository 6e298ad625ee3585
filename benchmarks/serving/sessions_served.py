"""Sessions of agents on real servers: KV tiers below the pool, and the routing policies.

python -m benchmarks.run --only sessions_served

Each server has 2 attention workers and 1 expert worker. The sessions are those of
`benchmarks/simulated/agent_trace.py`, with 4 tokens in place of each block of 512, so that a
context of 142,000 tokens has 1,100 here. The pools together hold 10% of all different tokens of the
trace, host memories 25% and disks 50%. The replay is 30 times as fast as the trace and covers its
first 40 minutes. A session sends a turn at its time in the trace, but not before the previous turn
has ended.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.checkpoints.random_checkpoint import RandomModel
from benchmarks.peers.http_systems import BATCH_LIMIT_S, start_ours
from benchmarks.report.results import table
from benchmarks.serving.throughput import random_model
from benchmarks.simulated.agent_trace import AgentRequest, agent_sessions
from benchmarks.simulated.retention import ideal_blocks, uses_of, working_set

BLOCK_TOKENS = 4
"""Tokens that replace a block of the trace."""
NUM_WORKERS = 2
"""Attention workers."""
PARTS = {"pool": 0.1, "host": 0.25, "disk": 0.5}
"""Tier -> size as a fraction of all different tokens of the trace."""
FASTER = 30.0
"""Seconds of the trace in one second."""
LAST_S = 2400.0
"""End of the replay in seconds of the trace; most sessions have ended by then."""
_ANSWER_TOKENS = 2
_SPARE_TOKENS = 64
"""Additional pool size for blocks that are not full."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """Sizes of the measurement."""

    num_sessions: int
    """Sessions of agents, without helper agents."""
    max_turns: int
    """Most turns of a session that are sent."""
    model: RandomModel


FULL = Case(num_sessions=60, max_turns=12, model=RandomModel(hidden=256, layers=4, ffn=128))
"""Sizes of the section in ``docs/results``."""
QUICK = Case(num_sessions=2, max_turns=3, model=RandomModel(hidden=64, layers=1, ffn=32, vocab=512))
"""Enough to see that everything runs."""
SYSTEMS: dict[str, tuple[str, Sequence[str]]] = {
    "round-robin, pool": ("round-robin", ()),
    "`kv`, pool": ("kv", ()),
    "`kv`, pool and host": ("kv", ("host",)),
    "`kv`, all tiers": ("kv", ("host", "disk")),
}
"""Label in the table -> routing policy and lower tiers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """Result of one request."""

    ttft_s: float
    prompt_tokens: int
    cached_tokens: int


def section(quick: bool) -> str:
    """Return the Markdown section."""
    case = QUICK if quick else FULL
    requests = _first_turns(case)
    uses = uses_of(requests)
    size = working_set(uses) * BLOCK_TOKENS
    ideal = ideal_blocks(uses, int(working_set(uses) * PARTS["disk"])) * BLOCK_TOKENS
    longest = max(len(request.blocks) for request in requests) * BLOCK_TOKENS + _ANSWER_TOKENS
    rows = []
    with random_model(case.model) as checkpoint:
        for name, (policy, tiers) in SYSTEMS.items():
            with _running(checkpoint, case.model, policy, tiers, size, longest) as url:
                served = asyncio.run(_replay(url, requests, case.model.vocab))
            rows.append([name, *_cells(served, ideal)])
    head = ["system", "cached tokens", "ratio to the ideal", "mean TTFT, ms", "TTFT, p90, ms"]
    return "\n\n".join(
        [
            "## Sessions, served",
            " ".join((__doc__ or "").split("\n\n", 2)[2].split()),
            f"{case.num_sessions} agents have one session each, and their helper agents have "
            f"further ones. Sessions end after at most {case.max_turns} turns; together they have "
            f"{len(requests):,} requests and {size:,} different tokens. The model is a random "
            f"OLMoE (hidden {case.model.hidden}, {case.model.layers} layers, {case.model.experts} "
            f"experts). The ideal is one cache with Belady's order that holds {PARTS['disk']:.0%}.",
            table(head, rows),
        ]
    )


def _first_turns(case: Case) -> list[AgentRequest]:
    """The first turns of each session until ``LAST_S``, in the order of arrival."""
    counts: dict[str, int] = {}
    found = []
    for request in agent_sessions(1, case.num_sessions):
        counts[request.session] = counts.get(request.session, 0) + 1
        if counts[request.session] <= case.max_turns and request.time_s < LAST_S:
            found.append(request)
    return found


@contextmanager
def _running(
    checkpoint: Path,
    model: RandomModel,
    policy: str,
    tiers: Sequence[str],
    size: int,
    longest: int,
) -> Iterator[str]:
    """Run a server and yield its URL. Its tiers hold their fractions of ``size`` tokens, and at
    least one sequence of ``longest`` tokens."""
    part = {name: max(int(share * size / NUM_WORKERS), longest) for name, share in PARTS.items()}
    token_bytes = 2 * 2 * model.layers * model.hidden  # keys and values in bfloat16
    with tempfile.TemporaryDirectory() as folder:
        options = [
            *("--num-attention-workers", str(NUM_WORKERS), "--num-expert-workers", "1"),
            *("--routing-policy", policy, "--max-model-len", str(longest)),
            *("--kv-cache-bytes", str((part["pool"] + _SPARE_TOKENS) * token_bytes)),
        ]
        if "host" in tiers:
            options += ["--kv-host-bytes", str(part["host"] * token_bytes)]
        if "disk" in tiers:
            options += ["--kv-disk-bytes", str(part["disk"] * token_bytes)]
            options += ["--kv-disk-dir", folder]
        server = start_ours(policy, checkpoint, "bfloat16", options)
        try:
            server.wait_loaded()
            yield server.url
        finally:
            server.close()


async def _replay(url: str, requests: Sequence[AgentRequest], vocab: int) -> list[Served]:
    """Send all turns; the turns of a session run in order."""
    sessions: dict[str, list[AgentRequest]] = {}
    for request in requests:
        sessions.setdefault(request.session, []).append(request)
    start, first_s = time.perf_counter(), requests[0].time_s
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=BATCH_LIMIT_S),
    ) as client:

        async def play(turns: Sequence[AgentRequest]) -> list[Served]:
            answered = []
            for turn in turns:
                due = start + (turn.time_s - first_s) / FASTER
                await asyncio.sleep(max(due - time.perf_counter(), 0.0))
                answered.append(await _ask(client, url, turn, vocab))
            return answered

        played = await asyncio.gather(*map(play, sessions.values()))
    return [served for session in played for served in session]


async def _ask(client: aiohttp.ClientSession, url: str, turn: AgentRequest, vocab: int) -> Served:
    """Stream one completion. Raises ``RuntimeError`` if it fails."""
    prompt = [token for block in turn.blocks for token in _tokens(block, vocab)]
    body = {
        "model": "model",
        "prompt": prompt,
        "max_tokens": _ANSWER_TOKENS,
        "ignore_eos": True,
        "temperature": 0,
        "session_id": turn.session,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    start, first, usage = time.perf_counter(), 0.0, dict[str, Any]()
    async with client.post(f"{url}/v1/completions", json=body) as answer:
        if answer.status != 200:
            raise RuntimeError(f"{url}: {answer.status}: {(await answer.text())[:500]}")
        async for line in answer.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(str(event["error"]))
            first = first or time.perf_counter()
            usage = event.get("usage") or usage
    return Served(
        ttft_s=first - start,
        prompt_tokens=usage["prompt_tokens"],
        cached_tokens=usage["prompt_tokens_details"]["cached_tokens"],
    )


def _tokens(block: int, vocab: int) -> list[int]:
    """The tokens of a block of the trace, equal in every call."""
    draw = random.Random(block)
    return [draw.randrange(4, vocab) for _ in range(BLOCK_TOKENS)]


def _cells(served: Sequence[Served], ideal: int) -> list[str]:
    cached = sum(each.cached_tokens for each in served)
    times = [each.ttft_s for each in served]
    return [
        f"{cached / sum(each.prompt_tokens for each in served):.3f}",
        f"{cached / ideal:.3f}",
        f"{statistics.fmean(times) * 1e3:.0f}",
        f"{statistics.quantiles(times, n=10)[8] * 1e3:.0f}",
    ]
