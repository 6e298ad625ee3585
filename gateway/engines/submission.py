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
"""Number of times that a request may be handed back before a missing adapter fails it."""
MAX_UNACKNOWLEDGED_DEATHS = 2
"""Number of workers that died before they acknowledged a request, after which the gateway sends
only one such request at a time."""
MAX_TOTAL_UNACKNOWLEDGED_DEATHS = 5
"""Number of workers that died before they acknowledged a request, after which the request fails."""
_MAX_DEADLINE_MS = 2**32 - 1
"""Maximum of ``Request.deadline_ms``, 49 days; workers refuse larger numbers."""


class RequestStage(Enum):
    """Progress of a request at its worker."""

    SENT = "sent"
    """The request is not acknowledged: in transit, or waiting for its grammar or KV blocks."""
    QUEUED = "queued"
    """The engine has queued the request."""
    ALONE = "alone"
    """The request runs in a solo step, in which its step group has no other rows."""


class OutputSink(Protocol):
    """Receives the outputs of one request."""

    def put(self, output: TokenOutput) -> None:
        """Receive an output of one choice of the request."""

    def fail(self, error: ExpertMeshError) -> None:
        """Receive the error with which the request failed."""


class AssignedStream(Protocol):
    """Stream to the worker to which a request is assigned."""

    @property
    def worker(self) -> str:
        """The worker's name."""

    def abort(self, request_id: str, choices: Sequence[int] = ()) -> None:
        """Abort a request at the worker, or only ``choices`` if not empty."""


@dataclass(slots=True)
class CountedLoad:
    """Part of a worker's load (``router.WorkerLoad``) that one request causes."""

    queued_tokens: int = 0
    num_decoding: int = 0
    outstanding_tokens: int = 0


@dataclass(slots=True, eq=False)
class Submission:
    """One request and its mutable state in the gateway, from its first assignment to its end.

    ``message`` combines request and state into the message for a worker.
    """

    request: Request
    """The request of the first attempt; never changed."""
    sink: OutputSink
    """Receives the outputs of the request."""
    deadline_s: float
    """Deadline of the request by ``time.monotonic``."""
    attempt: int = field(init=False)
    """Number of the current attempt (assignment to a worker); outputs have it, too."""
    open_choices: set[int] = field(init=False)
    """Indices of the choices that have not ended."""
    outputs: list[list[int]] = field(init=False)
    """Delivered token ids of each choice, with which the next attempt starts."""
    stream: AssignedStream | None = None
    """Stream to the worker that has the request; None while the request waits for a worker."""
    last_worker: str = ""
    """Name of the last worker that the request has left; empty if none."""
    engine: str = ""
    """Rank of the last attention worker, as text for the ``engine`` label of metrics."""
    stage: RequestStage = RequestStage.SENT
    """Progress of the request at its worker, as reported by the worker."""
    deaths: dict[str, bool] = field(default_factory=dict)
    """Workers that died with the request since its last token; after two deaths it runs alone. The
    value is True if neither the dead worker nor a later worker has acknowledged the request."""
    is_suspect: bool = False
    """Whether a worker wants to run the request alone, since its last token."""
    was_suspect: bool = False
    """Whether the request has ever been a suspect."""
    num_returns: int = 0
    """Number of times that workers handed back the request since its last token."""
    replay_cause: ReplayCause = ReplayCause.LOST
    """Reason why the request left its last worker."""
    was_sent: bool = False
    """Whether the request was sent to a worker, so that sending it again is a new attempt."""
    replays_s: list[float] = field(default_factory=list)
    """Start time of each attempt after the first, by ``time.monotonic``."""
    last_token_s: float = 0.0
    """Time of the last token by ``time.monotonic``; 0 before the first token."""
    prompt_hashes: Sequence[bytes] = ()
    """Short hashes of the prompt's full KV blocks, for routing."""
    block_hashes: Sequence[BlockHash] | None = None
    """Complete hashes of the prompt's full KV blocks, if copied to a second worker; else None."""
    missing_tokens: int = 0
    """Number of tokens that the worker must compute before it decodes, by the KV index."""
    kv_peer: str = ""
    """Worker from which the request's worker may fetch prompt blocks; empty if none."""
    pauses: bool = False
    """Whether its worker pauses the request after the next token, to hand it over."""
    is_computing: bool = False
    """Whether the request is at a worker that has not sent an output for it."""
    counted_load: CountedLoad = field(default_factory=CountedLoad)
    """The request's part of its worker's load."""

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
        """Number of workers that died with the request, at least those of a suspect."""
        return max(len(self.deaths), MAX_DEATHS * self.is_suspect)

    @property
    def outstanding_tokens(self) -> int:
        """Number of tokens that the request may still need: its remaining output, and its prompt if
        it has no output yet."""
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
        """Name of the request's current or last worker; empty if none."""
        return self.last_worker if self.stream is None else self.stream.worker

    def abort(self, choices: Sequence[int] = ()) -> None:
        """Abort the request, or only ``choices`` if not empty, without waiting for the worker."""
        if self.stream is not None:
            self.stream.abort(self.request.request_id, choices)
        else:
            self.close(choices)

    def close(self, choices: Sequence[int] = ()) -> None:
        """Mark choices as ended, all choices if ``choices`` is empty."""
        self.open_choices.difference_update(choices or tuple(self.open_choices))

    def deliver(self, output: TokenOutput) -> None:
        """Record an output of the request and pass it to the sink."""
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
        """Whether the worker's death, if it happens now, is blamed on this request only."""
        return self.must_be_sent_alone and self.stage is RequestStage.SENT

    def needs_confirmation(self, unresolved: Collection[str]) -> bool:
        """Whether the request must run alone but a worker that counts as dead may be alive.

        ``unresolved`` has the workers that may be alive although their connection was lost.
        """
        return self.num_deaths >= MAX_DEATHS and not self.deaths.keys().isdisjoint(unresolved)

    def set_stage(self, stage: RequestStage) -> None:
        """Record the stage that the worker reports, which acknowledges the request."""
        self.stage = stage
        self.deaths = dict.fromkeys(self.deaths, False)

    def clear(self) -> None:
        """Forget the deaths of earlier workers, since a step with the request has completed."""
        self.stage, self.is_suspect = RequestStage.QUEUED, False
        self.deaths.clear()

    def retract_death(self, worker: str) -> None:
        """Retract a worker's recorded death, since only the connection to the worker was lost."""
        self.deaths.pop(worker, None)

    def record_death(self) -> str | None:
        """Record the death of the last worker; return why this request caused it, or None.

        None means that the cause is unknown. Workers do not report which requests run, so a request
        that only waited counts the death, too. A request is the cause only after a death in its
        solo step, or repeated deaths on receipt.
        """
        self.deaths[self.last_worker] = self.stage is RequestStage.SENT
        if self.stage is RequestStage.ALONE:
            return "a third worker in a row was lost with it"
        if self.num_unacknowledged_deaths < MAX_TOTAL_UNACKNOWLEDGED_DEATHS:
            return None
        return f"{self.num_unacknowledged_deaths} workers in a row were lost when they received it"

    def is_handed_back(self, output: TokenOutput) -> bool:
        """Whether an output means that its worker cannot run the request but another worker may."""
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
        left_ms = min((self.deadline_s - now_s) * 1000, _MAX_DEADLINE_MS)
        return replace(
            self.request,
            attempt=self.attempt,
            output_so_far=tuple(map(tuple, self.outputs)) if any(self.outputs) else (),
            closed_choices=tuple(sorted(closed)),
            num_deaths=self.num_deaths,
            kv_peer=self.kv_peer,
            pauses=self.pauses,
            deadline_ms=max(1, int(left_ms)),
        )

    def next_attempt(self, now_s: float) -> None:
        """Begin another attempt (assignment of the request) at the monotonic time ``now_s``."""
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
