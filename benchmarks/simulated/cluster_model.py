"""A queueing model of a cluster with two pools, second by second: how many workers, what waits.

Requests wait in one queue and are spread evenly. In each second

- a request is admitted while its context has room in the KV of the attention workers, one of their
  ``max_num_seqs`` seats is free, and prompts of earlier ones leave time in this second,
- prompts take the attention workers' time that decodes leave; each decoding sequence advances by
  ``tokens_s``; where either pool has more than a second of work, all advance more slowly,
- workers that were ordered become ready after ``start_s``, workers that are to go leave after
  ``drain_s``: both count as used meanwhile, and requests of those that go continue elsewhere.

What the model leaves out: caches of prefixes, uneven load, and the pause of a generation change.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.simulated.request_trace import Arrival
from cluster.core.topology import Role
from cluster.policy.autoscaling import PoolSample

_LEAST_FOR_PROMPTS = 0.2
"""Fraction of the time that prompts get, for any number of decoding sequences."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerModel:
    """Capacity of one worker of each pool, per second."""

    prompt_tokens_s: float
    """Prompt tokens of an attention worker without other work."""
    decode_tokens_s: float = 600.0
    """Decoded tokens of an attention worker without other work."""
    tokens_s: float = 30.0
    """Decoded tokens of one sequence."""
    kv_tokens: int
    """Tokens in the KV cache of an attention worker."""
    max_num_seqs: int = 16
    expert_prompt_tokens_s: float
    """Prompt tokens of an expert worker without other work."""
    expert_decode_tokens_s: float = 500.0
    """Decoded tokens of an expert worker without other work; each activates more slots."""
    start_s: int = 60
    """Time from the start of a worker until it serves."""
    drain_s: int = 10
    """Time from the decision until a worker has left."""


@dataclass(slots=True)
class _Running:
    tokens: int
    prompt_left: float
    output_left: float


@dataclass(slots=True)
class Change:
    """A running scale operation."""

    role: Role
    wanted: int
    done_at: int


@dataclass(slots=True)
class Run:
    """Results of a policy."""

    paid: dict[Role, list[int]] = field(default_factory=lambda: {"attention": [], "expert": []})
    """Workers in each second, including starting and leaving workers."""
    samples: dict[Role, list[PoolSample]] = field(
        default_factory=lambda: {"attention": [], "expert": []}
    )
    waits_s: list[int] = field(default_factory=list)
    """Time in the queue of each admitted request."""
    num_changes: int = 0


Policy = Callable[[Mapping[Role, PoolSample] | None], Mapping[Role, int] | None]
"""Called every second, with None while a scale operation runs. Returns the desired numbers."""


class ClusterModel:
    """See the module."""

    def __init__(self, worker: WorkerModel, sizes: Mapping[Role, int]) -> None:
        self._worker = worker
        self._sizes = dict(sizes)
        self._queue: deque[tuple[int, Arrival]] = deque()
        self._running: list[_Running] = []
        self._kv_tokens = 0
        self._change: Change | None = None
        self.run = Run()

    def replay(self, arrivals: Sequence[Arrival], policy: Policy) -> Run:
        """Replay all arrivals."""
        end = int(arrivals[-1].time_s) + 1
        place = 0
        for now in range(end):
            self._finish_change(now)
            while place < len(arrivals) and arrivals[place].time_s < now + 1:
                self._queue.append((now, arrivals[place]))
                place += 1
            samples = self._second(now)
            wanted = policy(samples if self._change is None else None)
            if wanted is not None and self._change is None:
                self._begin_change(wanted, now)
            self._count(samples)
        self.run.waits_s += [end - since for since, _ in self._queue]
        return self.run

    def _second(self, now: int) -> dict[Role, PoolSample]:
        worker, attention, experts = self._worker, self._sizes["attention"], self._sizes["expert"]
        decoding = sum(not r.prompt_left for r in self._running)
        busy_s = decoding * worker.tokens_s / worker.decode_tokens_s
        left_s = max(attention - busy_s, _LEAST_FOR_PROMPTS * attention)
        self._admit(now, left_s * worker.prompt_tokens_s)
        prompt = min(sum(r.prompt_left for r in self._running), left_s * worker.prompt_tokens_s)
        attention_s = busy_s + prompt / worker.prompt_tokens_s
        expert_s = prompt / worker.expert_prompt_tokens_s
        expert_s += decoding * worker.tokens_s / worker.expert_decode_tokens_s
        speed = min(1.0, attention / max(attention_s, 1e-9), experts / max(expert_s, 1e-9))
        self._advance(prompt * speed, worker.tokens_s * speed)
        running, waiting = float(len(self._running)), float(len(self._queue))
        return {
            "attention": PoolSample(
                at_s=now,
                num_workers=attention,
                kv_use=self._kv_tokens / (attention * worker.kv_tokens),
                seat_use=running / (attention * worker.max_num_seqs),
                num_running=running,
                num_waiting=waiting,
            ),
            "expert": PoolSample(
                at_s=now, num_workers=experts, slot_time=min(expert_s / experts, 1.0)
            ),
        }

    def _admit(self, now: int, prompt_tokens: float) -> None:
        worker, attention = self._worker, self._sizes["attention"]
        backlog = sum(r.prompt_left for r in self._running)
        while self._queue and backlog < prompt_tokens:
            since, request = self._queue[0]
            tokens = request.prompt_tokens + request.output_tokens
            room = attention * worker.kv_tokens - self._kv_tokens
            if self._running and tokens > room:
                return
            if len(self._running) >= attention * worker.max_num_seqs:
                return
            self._queue.popleft()
            self._kv_tokens += tokens
            backlog += request.prompt_tokens
            entry = _Running(tokens, float(request.prompt_tokens), float(request.output_tokens))
            self._running.append(entry)
            self.run.waits_s.append(now - since)

    def _advance(self, prompt: float, output: float) -> None:
        left = []
        for r in self._running:
            if r.prompt_left:
                done = min(prompt, r.prompt_left)
                prompt -= done
                r.prompt_left = r.prompt_left - done if r.prompt_left - done > 1e-6 else 0.0
            else:
                r.output_left -= output
            if r.output_left > 0:
                left.append(r)
            else:
                self._kv_tokens -= r.tokens
        self._running = left

    # ---- changes ----------------------------------------------------------------------------

    def _begin_change(self, wanted: Mapping[Role, int], now: int) -> None:
        for role, size in self._sizes.items():
            if wanted[role] != size:
                grows = wanted[role] > size
                takes_s = self._worker.start_s if grows else self._worker.drain_s
                self._change = Change(role, wanted[role], now + takes_s)
                self.run.num_changes += 1
                return

    def _finish_change(self, now: int) -> None:
        if self._change is not None and now >= self._change.done_at:
            self._sizes[self._change.role] = self._change.wanted
            self._change = None

    def _count(self, samples: Mapping[Role, PoolSample]) -> None:
        for role, size in self._sizes.items():
            change = self._change
            more = change.wanted if change is not None and change.role == role else size
            self.run.paid[role].append(max(size, more))
            self.run.samples[role].append(samples[role])
