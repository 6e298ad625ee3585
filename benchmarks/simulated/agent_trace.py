"""Sessions of coding agents, generated from published statistics.

Target statistics and their sources:

- A median of 43 turns a session, 142,000 prompt tokens and 444 output tokens a request, more than
  96% of the prompt tokens seen before, helper agents in 44% of the sessions: AgentX, described at
  https://vllm.ai/blog/2026-09-08-vllm-agentx.
- 8.9 of 82.5 turns of a session answer a person, the others a tool: TraceLab (arXiv 2606.30560),
  https://tracelab.cs.washington.edu.
- Between an answer and the next request 1.6 s in the median, 8.6 s for three of four, 44 s for nine
  of ten: a production trace of 783,000 gaps, https://gitea.gahow.org/gahow/agentic-kvc.

Chosen without a published source: the sizes of shared prompts, the spread of the distributions, and
that a context of 262,144 tokens is compacted to a summary.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Set
from dataclasses import dataclass

from benchmarks.simulated.request_trace import BLOCK_TOKENS, TracedRequest

TURNS = (43, 1.0)
"""Turns of a session. All such pairs are the median and the spread of the logarithm."""
MAX_TURNS = 300
HELPER_TURNS = (6, 0.8)
"""Turns of a helper agent."""
HELPED_SESSIONS = 0.44
"""Fraction of the sessions with helper agents."""
HELPED_TURNS = 0.02
"""Fraction of the turns of such a session after which the agent waits for 1 to 3 helpers; at least
one turn."""
OUTPUT_TOKENS = (444, 1.1)
FIRST_TOKENS = (92_000, 0.5)
"""Tokens of a session's first prompt after the shared prompt."""
TASK_TOKENS = (8_000, 0.7)
"""Tokens of a helper agent's first prompt after the shared prompt."""
TOOL_TOKENS = (1000, 1.2)
"""Tokens that a tool or a person adds to the context."""
CONTEXT_TOKENS = 262_144
"""Most tokens of a context."""
SUMMARY_TOKENS = (40_000, 100_000)
"""Fewest and most tokens of a compacted context after the shared prompt."""
NUM_AGENTS = 6
"""Number of kinds of agents, each with a separate system prompt and tools."""
SHARED_BLOCKS = (24, 48)
"""Fewest and most blocks of such a system prompt."""
ASKED_TURNS = 8.9 / 82.5
"""Fraction of the turns after which a person answers."""
TOOL_GAP_S = (1.4, 1.5)
PERSON_GAP_S = (90.0, 1.3)
TOKENS_PER_S = 60.0
"""Output tokens a second; the gap to the next turn starts at the end of the output."""


@dataclass(frozen=True, slots=True)
class AgentRequest(TracedRequest):
    """One turn of a session."""

    session: str
    """Name of the session; a helper agent has a separate session."""
    output_tokens: int
    is_last: bool
    """Whether the turn is the last one of its session."""


def agent_sessions(seed: int, num_sessions: int, rate_per_s: float = 0.05) -> list[AgentRequest]:
    """Turns of all sessions, in the order of arrival; sessions begin at random."""
    maker = _Maker(random.Random(seed))
    found: list[AgentRequest] = []
    start_s = 0.0
    for number in range(num_sessions):
        start_s += maker.draw.expovariate(rate_per_s)
        found += maker.session(f"s{number}", start_s)
    return sorted(found, key=lambda request: request.time_s)


def one_shots(seed: int, seconds: float, rate_per_s: float) -> list[AgentRequest]:
    """Single requests without a next turn: documents with a median of 60 blocks."""
    draw, found, time_s = random.Random(seed), list[AgentRequest](), 0.0
    block = 10**9
    while (time_s := time_s + draw.expovariate(rate_per_s)) < seconds:
        blocks = range(block, block := block + 1 + _whole(draw, (60, 0.8)))
        tokens = len(blocks) * BLOCK_TOKENS
        found.append(AgentRequest(time_s, tokens, blocks, "", 400, True))
    return found


class _Maker:
    """Generates sessions and names their blocks."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw
        self._next_block = NUM_AGENTS * 1000
        sizes = [draw.randint(*SHARED_BLOCKS) for _ in range(NUM_AGENTS)]
        self._shared = [list(range(1000 * i, 1000 * i + n)) for i, n in enumerate(sizes)]
        self._popularity = [1 / (i + 1) for i in range(NUM_AGENTS)]

    def session(self, name: str, start_s: float) -> list[AgentRequest]:
        """Generate a session and the sessions of its helpers."""
        draw = self.draw
        turns = min(1 + _whole(draw, TURNS), MAX_TURNS)
        helped = set[int]()
        if draw.random() < HELPED_SESSIONS:
            helped = {turn for turn in range(turns) if draw.random() < HELPED_TURNS}
            helped.add(draw.randrange(turns))
        shared = draw.choices(self._shared, self._popularity)[0]
        return list(self._turns(name, start_s, shared, turns, helped))

    def _turns(
        self,
        name: str,
        time_s: float,
        shared: list[int],
        num_turns: int,
        helped: Set[int] = frozenset(),
        is_helper: bool = False,
    ) -> Iterator[AgentRequest]:
        draw = self.draw
        context, tokens = list(shared), len(shared) * BLOCK_TOKENS
        more = _whole(draw, TASK_TOKENS if is_helper else FIRST_TOKENS)
        for turn in range(num_turns):
            tokens += more
            if tokens > CONTEXT_TOKENS:
                context = list(shared)
                tokens = len(context) * BLOCK_TOKENS + draw.randint(*SUMMARY_TOKENS)
            num_new = tokens // BLOCK_TOKENS - len(context)
            context += range(self._next_block, self._next_block + num_new)
            self._next_block += num_new
            output = 1 + _whole(draw, OUTPUT_TOKENS)
            is_last = turn == num_turns - 1
            yield AgentRequest(time_s, tokens, tuple(context), name, output, is_last)
            time_s += output / TOKENS_PER_S
            if turn in helped:
                begin_s = time_s
                for helper in range(draw.randint(1, 3)):
                    length = min(1 + _whole(draw, HELPER_TURNS), MAX_TURNS)
                    own = f"{name}.{turn}.{helper}"
                    turns = self._turns(own, begin_s, self._shared[-1], length, is_helper=True)
                    for request in turns:
                        yield request
                        end_s = request.time_s + request.output_tokens / TOKENS_PER_S
                        time_s = max(time_s, end_s)
            elif draw.random() < ASKED_TURNS:
                time_s += _drawn(draw, PERSON_GAP_S)
            else:
                time_s += _drawn(draw, TOOL_GAP_S)
            more = output + _whole(draw, TOOL_TOKENS)


def _drawn(draw: random.Random, about: tuple[float, float]) -> float:
    return draw.lognormvariate(math.log(about[0]), about[1])


def _whole(draw: random.Random, about: tuple[float, float]) -> int:
    return int(_drawn(draw, about))
