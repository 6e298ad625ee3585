"""The record around a request in the engines: its attempts, the output so far, its worker.

A lost worker loses nothing that was delivered: the message of the next attempt carries the output
so far, and tokens of older attempts, or repeated ones, are dropped. Pure apart from its own state;
the time is passed in.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from msgspec.structs import replace

from cluster.core.errors import ExpertMeshError
from gateway.core.replay import ReplayCause
from workers.requests.block_hash import SHORT_BYTES, BlockHash
from workers.requests.request import MAX_DEATHS, FinishReason, Request, TokenOutput

_HANDED_BACK = frozenset({"not_ready", "draining"})
"""Error codes of requests that a worker hands back and another one can serve."""
MAX_RETURNS_WITHOUT_ADAPTER = 3
"""Returns by workers that lack its adapter, after which a request fails."""
MAX_SILENT_DEATHS = 2
"""Deaths before a worker has said that it has the request, after which it is sent alone."""
MAX_SILENT_DEATHS_IN_ALL = 5
"""Such deaths after which a request fails."""


class RequestStage(Enum):
    """How far a request is at its worker."""

    SENT = "sent"
    """It is on its way, or waits for its grammar or for KV blocks; the worker never says so."""
    QUEUED = "queued"
    """The engine has it."""
    ALONE = "alone"
    """It runs a step alone."""


class OutputSink(Protocol):
    """Receives the outputs of one request."""

    def put(self, output: TokenOutput) -> None:
        """An output of a choice."""

    def fail(self, error: ExpertMeshError) -> None:
        """The request failed."""


class AssignedStream(Protocol):
    """The stream to the worker that has a request."""

    @property
    def worker(self) -> str:
        """The worker's name."""

    def abort(self, request_id: str, choices: Sequence[int] = ()) -> None:
        """Abort the request there, or some of its choices."""


@dataclass(slots=True, eq=False)
class Submission:
    """One request from its first assignment to its end: what may change of it.

    ``message`` puts both together for a worker.
    """

    request: Request
    """As the gateway made it; it never changes."""
    sink: OutputSink
    """Where its outputs go."""
    deadline_s: float
    """``time.monotonic`` of its deadline."""
    attempt: int = field(init=False)
    """Number of the attempt that is under way; outputs name it."""
    open_choices: set[int] = field(init=False)
    """Choices that have not ended."""
    outputs: list[list[int]] = field(init=False)
    """By choice, the delivered tokens, which the next attempt carries."""
    stream: AssignedStream | None = None
    """The worker that runs it; None while it waits for one."""
    last_worker: str = ""
    """Its last worker, which handed it back or was lost."""
    engine: str = ""
    """Index of the attention worker that it was last sent to."""
    stage: RequestStage = RequestStage.SENT
    """How far it is at its worker, as the worker has said."""
    deaths: dict[str, bool] = field(default_factory=dict)
    """Workers that died while they had it, since its last token: after two it runs alone. Whether
    they died before they said that they had it, and none has said so since."""
    num_returns: int = 0
    """Number of times it was handed back since its last token."""
    replay_cause: ReplayCause = ReplayCause.LOST
    """Why it left its last worker."""
    was_sent: bool = False
    """It was sent to a worker before: the next one gets a new attempt."""
    replays_s: list[float] = field(default_factory=list)
    """``time.monotonic`` of each attempt after the first."""
    last_token_s: float = 0.0
    """``time.monotonic`` of its last token; 0 before the first."""
    prompt_hashes: Sequence[bytes] = ()
    """Names of the prompt's full KV blocks, for routing."""
    block_hashes: Sequence[BlockHash] | None = None
    """The same in full length; None: its blocks are not copied."""
    missing_tokens: int = 0
    """Prompt tokens that its worker must compute, by the KV index."""
    kv_peer: str = ""
    """Worker from which its worker may fetch blocks of the prompt; empty: none."""
    is_computing: bool = False
    """Its worker has sent no output yet."""
    counted: tuple[int, int] = (0, 0)
    """Its part of its worker's load: prompt tokens to compute, sequences that decode."""

    def __post_init__(self) -> None:
        choices = self.request.n
        self.attempt = self.request.attempt
        so_far = self.request.output_so_far
        self.open_choices = set(range(choices)) - set(self.request.closed_choices)
        self.outputs = [list(ids) for ids in so_far] or [[] for _ in range(choices)]

    def set_hashes(self, hashes: Sequence[BlockHash]) -> None:
        """Name the full KV blocks of its prompt."""
        self.prompt_hashes = [name[:SHORT_BYTES] for name in hashes]
        self.block_hashes = hashes if self.request.is_kept else None

    @property
    def is_waiting(self) -> bool:
        """It is not finished, and no worker runs it."""
        return self.stream is None and bool(self.open_choices)

    @property
    def num_deaths(self) -> int:
        return len(self.deaths)

    @property
    def outstanding_tokens(self) -> int:
        """Tokens that this request may still need: its prompt and its remaining outputs."""
        missing = self.request.params.max_tokens * len(self.open_choices)
        done = sum(len(self.outputs[choice]) for choice in self.open_choices)
        is_started = any(self.outputs)
        return missing - done + (0 if is_started else len(self.request.prompt))

    @property
    def num_known_tokens(self) -> int:
        """Tokens that another worker must recompute: each choice's output, and the prompt once."""
        return len(self.request.prompt) + sum(len(self.outputs[c]) for c in self.open_choices)

    @property
    def worker(self) -> str:
        """Its current or last worker; empty if none."""
        return self.last_worker if self.stream is None else self.stream.worker

    def abort(self, choices: Sequence[int] = ()) -> None:
        """Abort it, or some of its choices; never waits, no effect after its end."""
        if self.stream is not None:
            self.stream.abort(self.request.request_id, choices)
        else:
            self.close(choices)

    def close(self, choices: Sequence[int] = ()) -> None:
        """These choices (none named: all) need no more output."""
        self.open_choices.difference_update(choices or tuple(self.open_choices))

    def deliver(self, output: TokenOutput) -> None:
        """Pass these tokens to the sink."""
        self.outputs[output.choice].extend(output.token_ids)
        self.num_returns = 0
        if output.token_ids:
            self.clear()
        if output.finish_reason is not None:
            self.open_choices.discard(output.choice)
        self.sink.put(output)

    @property
    def num_silent_deaths(self) -> int:
        """Workers that died before they said that they had it, since one has said so."""
        return sum(self.deaths.values())

    @property
    def must_be_sent_alone(self) -> bool:
        """It may kill workers on receipt: no other such request is on its way meanwhile."""
        return self.num_silent_deaths >= MAX_SILENT_DEATHS

    @property
    def may_kill_on_receipt(self) -> bool:
        """If its worker dies now, it is the likely cause, not a request that the engine has."""
        return self.must_be_sent_alone and self.stage is RequestStage.SENT

    def awaits_verdict(self, unjudged: Collection[str]) -> bool:
        """It would run alone, but one of these workers, an ``unjudged`` one, may not have died."""
        return self.num_deaths >= MAX_DEATHS and not self.deaths.keys().isdisjoint(unjudged)

    def reach(self, stage: RequestStage) -> None:
        """Its worker says how far it is; a step alone is over when it is cleared."""
        self.stage = stage
        self.deaths = dict.fromkeys(self.deaths, False)

    def clear(self) -> None:
        """A step with it has committed: it did not cause earlier deaths."""
        self.stage = RequestStage.QUEUED
        self.deaths.clear()

    def acquit(self, worker: str) -> None:
        """A worker lives after all: only a connection to it was lost."""
        self.deaths.pop(worker, None)

    def lose(self) -> str | None:
        """Its last worker died; why this request is the cause, None if it may run again.

        A worker does not report which requests a step has: one that only waits counts the death,
        too, and runs alone in the end. Only then it may fail.
        """
        self.deaths[self.last_worker] = self.stage is RequestStage.SENT
        if self.stage is RequestStage.ALONE:
            return "a third worker in a row was lost with it"
        if self.num_silent_deaths < MAX_SILENT_DEATHS_IN_ALL:
            return None
        return f"{self.num_silent_deaths} workers in a row were lost when they received it"

    def is_handed_back(self, output: TokenOutput) -> bool:
        """Whether an output says that the worker cannot continue while another one may."""
        if output.finish_reason is FinishReason.ABORT:
            return True
        is_full = output.error_code == "queue_full" and self.attempt > 0
        lacks_adapter = output.error_code == "model_not_found" and bool(self.request.adapter)
        may_be_elsewhere = lacks_adapter and self.num_returns < MAX_RETURNS_WITHOUT_ADAPTER
        is_refused = output.finish_reason is FinishReason.ERROR
        return is_refused and (is_full or may_be_elsewhere or output.error_code in _HANDED_BACK)

    def message(self, now_s: float) -> Request:
        """The request of the current attempt, with the output so far and the time that is left."""
        closed = set(range(self.request.n)) - self.open_choices
        return replace(
            self.request,
            attempt=self.attempt,
            output_so_far=tuple(map(tuple, self.outputs)) if any(self.outputs) else (),
            closed_choices=tuple(sorted(closed)),
            num_deaths=self.num_deaths,
            kv_peer=self.kv_peer,
            deadline_ms=max(1, int((self.deadline_s - now_s) * 1000)),
        )

    def next_attempt(self, now_s: float) -> None:
        """Begin another attempt, at another worker."""
        self.replays_s.append(now_s)
        self.stage = RequestStage.SENT
        self.attempt += 1


def without_first(output: TokenOutput, count: int) -> TokenOutput:
    """An output without its first ``count`` tokens, which were delivered before."""
    return replace(
        output,
        index=output.index + min(count, len(output.token_ids)),
        token_ids=output.token_ids[count:],
        logprobs=output.logprobs[count:],
    )
