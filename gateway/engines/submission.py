"""State of a request at the engines: its attempts, its output so far and its worker.

The loss of a worker loses no delivered tokens: the next attempt is sent with the output so far, and
repeated tokens and tokens of older attempts are dropped. Pure: callers pass the time.
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
"""Error codes with which a worker hands back a request that another worker can serve."""
MAX_RETURNS_WITHOUT_ADAPTER = 3
"""Number of times that workers without its adapter may hand back a request before it fails."""
MAX_UNACKNOWLEDGED_DEATHS = 2
"""Number of workers that died before acknowledging a request, after which it is sent alone."""
MAX_TOTAL_UNACKNOWLEDGED_DEATHS = 5
"""Number of such deaths after which a request fails."""


class RequestStage(Enum):
    """Progress of a request at its worker."""

    SENT = "sent"
    """Sent, but not acknowledged: in transit, or waiting for its grammar or KV blocks."""
    QUEUED = "queued"
    """The engine has queued the request."""
    ALONE = "alone"
    """The request runs in a solo step."""


class OutputSink(Protocol):
    """Receives the outputs of one request."""

    def put(self, output: TokenOutput) -> None:
        """Receive an output of a choice."""

    def fail(self, error: ExpertMeshError) -> None:
        """Receive the error of a failed request."""


class AssignedStream(Protocol):
    """Stream to the worker that has a request."""

    @property
    def worker(self) -> str:
        """The worker's name."""

    def abort(self, request_id: str, choices: Sequence[int] = ()) -> None:
        """Abort the request at the worker, or some of its choices."""


@dataclass(slots=True, eq=False)
class Submission:
    """One request and its mutable state, from its first assignment to its end.

    ``message`` combines request and state into the message for a worker.
    """

    request: Request
    """The request of the first attempt; never changed."""
    sink: OutputSink
    """Receives the outputs of the request."""
    deadline_s: float
    """Deadline by ``time.monotonic``."""
    attempt: int = field(init=False)
    """Number of the current attempt, which outputs also contain."""
    open_choices: set[int] = field(init=False)
    """Choices that have not ended."""
    outputs: list[list[int]] = field(init=False)
    """Delivered tokens by choice, with which the next attempt starts."""
    stream: AssignedStream | None = None
    """Stream to the worker that has the request; None while the request waits for a worker."""
    last_worker: str = ""
    """The last worker that handed back the request or was lost."""
    engine: str = ""
    """Index of the last attention worker."""
    stage: RequestStage = RequestStage.SENT
    """Progress at the worker, as reported by the worker."""
    deaths: dict[str, bool] = field(default_factory=dict)
    """Workers that died with the request since its last token; after two deaths it runs alone. The
    value is True if neither that worker nor a later one has acknowledged the request."""
    num_returns: int = 0
    """Number of times that workers handed back the request since its last token."""
    replay_cause: ReplayCause = ReplayCause.LOST
    """Reason why the request left its last worker."""
    was_sent: bool = False
    """Whether the request was sent to a worker, so that sending it again is a new attempt."""
    replays_s: list[float] = field(default_factory=list)
    """Time of each attempt after the first, by ``time.monotonic``."""
    last_token_s: float = 0.0
    """Time of the last token by ``time.monotonic``; 0 before the first token."""
    prompt_hashes: Sequence[bytes] = ()
    """Short hashes of the prompt's full KV blocks, for routing."""
    block_hashes: Sequence[BlockHash] | None = None
    """Full hashes of the same blocks; None if the blocks are not copied to a second worker."""
    missing_tokens: int = 0
    """Number of prompt tokens that the worker must compute, according to the KV index."""
    kv_peer: str = ""
    """Worker from which the request's worker may fetch prompt blocks; empty if none."""
    is_computing: bool = False
    """Whether the worker has yet to send an output."""
    counted_load: tuple[int, int] = (0, 0)
    """The request's part of the worker's load: prompt tokens to compute, decoding sequences."""

    def __post_init__(self) -> None:
        choices = self.request.n
        self.attempt = self.request.attempt
        so_far = self.request.output_so_far
        self.open_choices = set(range(choices)) - set(self.request.closed_choices)
        self.outputs = [list(ids) for ids in so_far] or [[] for _ in range(choices)]

    def set_hashes(self, hashes: Sequence[BlockHash]) -> None:
        """Set the hashes of the prompt's full KV blocks."""
        self.prompt_hashes = [name[:SHORT_BYTES] for name in hashes]
        self.block_hashes = hashes if self.request.is_retained else None

    @property
    def is_waiting(self) -> bool:
        """Whether the request is unfinished and has no worker."""
        return self.stream is None and bool(self.open_choices)

    @property
    def num_deaths(self) -> int:
        return len(self.deaths)

    @property
    def outstanding_tokens(self) -> int:
        """Number of tokens that the request may still need: its prompt and its remaining output."""
        missing = self.request.params.max_tokens * len(self.open_choices)
        done = sum(len(self.outputs[choice]) for choice in self.open_choices)
        is_started = any(self.outputs)
        return missing - done + (0 if is_started else len(self.request.prompt))

    @property
    def num_known_tokens(self) -> int:
        """Number of tokens of the prompt and of the outputs of open choices, which another worker
        must recompute."""
        return len(self.request.prompt) + sum(len(self.outputs[c]) for c in self.open_choices)

    @property
    def worker(self) -> str:
        """Name of the current or last worker; empty if none."""
        return self.last_worker if self.stream is None else self.stream.worker

    def abort(self, choices: Sequence[int] = ()) -> None:
        """Abort the request or some of its choices, without waiting. No effect after its end."""
        if self.stream is not None:
            self.stream.abort(self.request.request_id, choices)
        else:
            self.close(choices)

    def close(self, choices: Sequence[int] = ()) -> None:
        """Mark choices as ended, all choices if ``choices`` is empty."""
        self.open_choices.difference_update(choices or tuple(self.open_choices))

    def deliver(self, output: TokenOutput) -> None:
        """Record an output and pass it to the sink."""
        self.outputs[output.choice].extend(output.token_ids)
        self.num_returns = 0
        if output.token_ids:
            self.clear()
        if output.finish_reason is not None:
            self.open_choices.discard(output.choice)
        self.sink.put(output)

    @property
    def num_unacknowledged_deaths(self) -> int:
        """Number of workers that died with the request since it was last acknowledged."""
        return sum(self.deaths.values())

    @property
    def must_be_sent_alone(self) -> bool:
        """Whether the request may kill workers on receipt. Only one such request is sent at a
        time."""
        return self.num_unacknowledged_deaths >= MAX_UNACKNOWLEDGED_DEATHS

    @property
    def may_kill_on_receipt(self) -> bool:
        """Whether, if the worker dies now, this request is a likelier cause than queued ones."""
        return self.must_be_sent_alone and self.stage is RequestStage.SENT

    def needs_confirmation(self, unresolved: Collection[str]) -> bool:
        """Whether the request is to run alone but one of its dead workers may still be alive."""
        return self.num_deaths >= MAX_DEATHS and not self.deaths.keys().isdisjoint(unresolved)

    def set_stage(self, stage: RequestStage) -> None:
        """Record an acknowledged stage; ``clear`` ends a solo step."""
        self.stage = stage
        self.deaths = dict.fromkeys(self.deaths, False)

    def clear(self) -> None:
        """Forget earlier deaths, since a step with the request has completed."""
        self.stage = RequestStage.QUEUED
        self.deaths.clear()

    def retract_death(self, worker: str) -> None:
        """Retract a recorded death: only the connection to the worker was lost."""
        self.deaths.pop(worker, None)

    def record_death(self) -> str | None:
        """Record the death of the last worker; return why this request is its cause, or None.

        Workers do not report which requests run, so a request that only waited counts the death,
        too. Only a death in a solo step, or repeated deaths on receipt, make it the cause.
        """
        self.deaths[self.last_worker] = self.stage is RequestStage.SENT
        if self.stage is RequestStage.ALONE:
            return "a third worker in a row was lost with it"
        if self.num_unacknowledged_deaths < MAX_TOTAL_UNACKNOWLEDGED_DEATHS:
            return None
        return f"{self.num_unacknowledged_deaths} workers in a row were lost when they received it"

    def is_handed_back(self, output: TokenOutput) -> bool:
        """Whether an output means that its worker cannot run the request but another one may."""
        if output.finish_reason is FinishReason.ABORT:
            return True
        is_full = output.error_code == "queue_full" and self.attempt > 0
        lacks_adapter = output.error_code == "model_not_found" and bool(self.request.adapter)
        may_be_elsewhere = lacks_adapter and self.num_returns < MAX_RETURNS_WITHOUT_ADAPTER
        is_refused = output.finish_reason is FinishReason.ERROR
        return is_refused and (is_full or may_be_elsewhere or output.error_code in _HANDED_BACK)

    def message(self, now_s: float) -> Request:
        """Make the request of the current attempt, with the output so far and the time left."""
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
        """Begin another attempt."""
        self.replays_s.append(now_s)
        self.stage = RequestStage.SENT
        self.attempt += 1


def without_first(output: TokenOutput, count: int) -> TokenOutput:
    """Copy an output without its first ``count`` tokens."""
    return replace(
        output,
        index=output.index + min(count, len(output.token_ids)),
        token_ids=output.token_ids[count:],
        logprobs=output.logprobs[count:],
    )
