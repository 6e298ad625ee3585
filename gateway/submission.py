"""A request in the hands of the engines: what it has brought so far, and who works on it.

A worker that is lost takes nothing with it that was delivered: ``again`` makes the next attempt,
which carries the output so far, and tokens of older attempts, or that came before, are dropped.
Pure apart from its own state; the time is passed in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Protocol

from cluster.errors import ExpertMeshError
from workers.request import FinishReason, Request, TokenOutput

_HANDED_BACK = frozenset({"not_ready", "draining"})
"""Error codes with which a worker gives back what another one can do."""


class ReplayCause(Enum):
    """Why a request goes on at another worker."""

    LOST = "attention_worker"
    """Its worker was lost."""
    HANDED_BACK = "handed_back"
    """Its worker is drained, or had no room for it."""


class OutputSink(Protocol):
    """Takes what comes for one request."""

    def put(self, output: TokenOutput) -> None:
        """News of a choice."""

    def fail(self, error: ExpertMeshError) -> None:
        """The request will not be finished."""


class Home(Protocol):
    """The stream to the worker that has a request."""

    @property
    def worker(self) -> str:
        """Its name."""

    def abort(self, request_id: str, choices: Sequence[int] = ()) -> None:
        """End the request there, or some of its choices."""


@dataclass(slots=True, eq=False)
class Submission:
    """One request from its first assignment to its end."""

    request: Request
    """As it was sent last; its attempt is the current one."""
    sink: OutputSink
    """Where its outputs go."""
    deadline_s: float
    """``time.monotonic`` at which it is of no use any more."""
    open_choices: set[int] = field(init=False)
    """Choices that have not ended."""
    outputs: list[list[int]] = field(init=False)
    """By choice, the tokens delivered: what the next attempt carries."""
    home: Home | None = None
    """Who works on it; None while it waits for a worker."""
    last_worker: str = ""
    """Who had it last: gave it back, or was lost with it."""
    engine: str = ""
    """Index of the attention worker that it was sent to last."""
    num_deaths: int = 0
    """Workers that died with it since it last had a token."""
    is_alone: bool = False
    """It runs a step alone: if the worker dies now, it is to blame."""
    num_returns: int = 0
    """How often it was handed back since its last token."""
    replay_cause: ReplayCause = ReplayCause.LOST
    """Why it left its last worker."""
    was_sent: bool = False
    """A worker has had it: the next one gets a new attempt."""
    replays_s: list[float] = field(default_factory=list)
    """``time.monotonic`` of each attempt after the first."""
    prompt_hashes: Sequence[bytes] = ()
    """Names of the prompt's full KV blocks, for routing."""
    missing_tokens: int = 0
    """Tokens that its worker has to compute before it draws the first one, by the KV index."""
    kv_peer: str = ""
    """Worker from which its worker may fetch blocks of the prompt; empty: none."""
    is_computing: bool = False
    """Its worker has brought nothing yet."""
    counted: tuple[int, int] = (0, 0)
    """Its part in its worker's load: prompt tokens to compute, sequences that decode."""

    def __post_init__(self) -> None:
        choices = self.request.n
        so_far = self.request.output_so_far
        self.open_choices = set(range(choices)) - set(self.request.closed_choices)
        self.outputs = [list(ids) for ids in so_far] or [[] for _ in range(choices)]

    @property
    def is_waiting(self) -> bool:
        """It is not finished, and nobody works on it."""
        return self.home is None and bool(self.open_choices)

    @property
    def outstanding_tokens(self) -> int:
        """Tokens that this request may still need: prompt, and outputs to come."""
        missing = self.request.params.max_tokens * len(self.open_choices)
        done = sum(len(self.outputs[choice]) for choice in self.open_choices)
        is_started = any(self.outputs)
        return missing - done + (0 if is_started else len(self.request.prompt))

    @property
    def num_known_tokens(self) -> int:
        """Tokens that another worker computes anew, each choice's output and the prompt once."""
        return len(self.request.prompt) + sum(len(self.outputs[c]) for c in self.open_choices)

    @property
    def worker(self) -> str:
        """Who works on it, or did last; empty: nobody."""
        return self.last_worker if self.home is None else self.home.worker

    def abort(self, choices: Sequence[int] = ()) -> None:
        """End it, or some of its choices; never waits, does no harm after the end."""
        if self.home is not None:
            self.home.abort(self.request.request_id, choices)
        else:
            self.close(choices)

    def close(self, choices: Sequence[int] = ()) -> None:
        """Nothing is wanted of these choices any more (none named: of all)."""
        self.open_choices.difference_update(choices or tuple(self.open_choices))

    def deliver(self, output: TokenOutput) -> None:
        """These tokens go to the sink."""
        self.outputs[output.choice].extend(output.token_ids)
        self.num_returns = 0
        if output.token_ids:
            self.clear()
        if output.finish_reason is not None:
            self.open_choices.discard(output.choice)
        self.sink.put(output)

    def clear(self) -> None:
        """A step of it committed: no death before that is its doing."""
        self.num_deaths, self.is_alone = 0, False

    def lose(self) -> None:
        """Its worker died."""
        self.num_deaths, self.is_alone = self.num_deaths + 1, False

    def is_handed_back(self, output: TokenOutput) -> bool:
        """Whether an output says that the worker will not go on, and another one may."""
        if output.finish_reason is FinishReason.ABORT:
            return True
        is_full = output.error_code == "queue_full" and self.request.attempt > 0
        is_refused = output.finish_reason is FinishReason.ERROR
        return is_refused and (is_full or output.error_code in _HANDED_BACK)

    def again(self, now_s: float) -> Request:
        """The next attempt, which becomes the current one."""
        self.replays_s.append(now_s)
        closed = set(range(self.request.n)) - self.open_choices
        self.request = replace(
            self.request,
            attempt=self.request.attempt + 1,
            output_so_far=tuple(map(tuple, self.outputs)),
            closed_choices=tuple(sorted(closed)),
            num_deaths=self.num_deaths,
            deadline_ms=max(1, int((self.deadline_s - now_s) * 1000)),
        )
        return self.request


def without_first(output: TokenOutput, count: int) -> TokenOutput:
    """An output without its first ``count`` tokens, which were delivered before."""
    return replace(
        output,
        index=output.index + min(count, len(output.token_ids)),
        token_ids=output.token_ids[count:],
        logprobs=output.logprobs[count:],
    )
