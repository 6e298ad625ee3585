"""What becomes of a request, and whether it is right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from cluster.core.errors import (
    DeadlineExceededError,
    ExpertMeshError,
    NotReadyError,
    QueueFullError,
)
from gateway.core.delta import ChoiceDelta
from tests.simulation.asks import REQUEST_LIMIT_S, Ask, RightChoice, right_choices
from workers.requests.request import TokenOutput

_ROUNDING_S = 0.001
"""A worker gets the time that a request has left in whole milliseconds."""
_STILL_S = 15.0
"""Longest time for which a gateway may stand still."""


@dataclass(slots=True)
class ChoiceOutcome:
    """What the engines and the gateway made of a choice."""

    right: RightChoice
    tokens: list[int] = field(default_factory=list)
    """Those that the gateway has from the engines."""
    ends: list[str] = field(default_factory=list)
    """Ends that the engines reported; one, when all is well."""
    received: list[int] = field(default_factory=list)
    """Those that the client has."""
    text: str = ""
    """Its text."""
    finish: str = ""
    """The end that the client has."""

    def judge(self, first: int) -> str:
        """What is wrong with the tokens from ``first`` on, and the ends; empty if nothing is."""
        got, right = self.tokens, self.right.tokens
        for place in range(first, len(got)):
            if place >= len(right) or got[place] != right[place]:
                return f"token {place} is wrong"
        if len(self.ends) > 1:
            return f"ends twice: {self.ends}"
        if self.ends and self.ends[0] in ("stop", "length") and len(got) != len(right):
            return f"ends after {len(got)} of {len(right)} tokens"
        return ""

    def judge_received(self) -> str:
        """What is wrong with what the client has; empty if nothing is."""
        right = self.right.received
        if self.received != right[: len(self.received)]:
            return "the client has other tokens"
        if not self.right.text.startswith(self.text):
            return "the client has another text"
        whole = self.right.end, len(right), self.right.text
        if self.finish and (self.finish, len(self.received), self.text) != whole:
            return f"the client misses something: {self.finish} after {len(self.received)} tokens"
        return ""


@dataclass(slots=True)
class Outcome:
    """What the engines and the gateway made of a request."""

    ask: Ask
    begins_at: float
    """When the client asks, on the simulation's clock."""
    error: str = ""
    code: str = ""
    is_over: bool = False
    """The client has the end, an error, or has left."""
    has_left: bool = False
    is_late: bool = False
    """Its time was over."""
    was_refused: bool = False
    """A worker had no room for it, before its first token."""
    problems: list[str] = field(default_factory=list)
    """What is wrong with what came, of all clients."""
    choices: list[ChoiceOutcome] = field(init=False)

    def __post_init__(self) -> None:
        self.choices = [ChoiceOutcome(right) for right in right_choices(self.ask)]

    @property
    def is_right(self) -> bool:
        """The client has all of it."""
        return all(c.finish == c.right.end for c in self.choices)

    @property
    def ends(self) -> list[str]:
        """How the choices ended, for people."""
        return [choice.finish or ", ".join(choice.ends) or "open" for choice in self.choices]

    @property
    def num_tokens(self) -> int:
        """Tokens from the engines."""
        return sum(len(choice.tokens) for choice in self.choices)

    def put(self, output: TokenOutput) -> None:
        """From an engine."""
        choice = self.choices[output.choice]
        first = len(choice.tokens)
        choice.tokens += output.token_ids
        if output.finish_reason is not None:
            choice.ends.append(output.finish_reason.value)
            self.error, self.code = output.error or "", output.error_code
        self._note_problem(output.choice, choice.judge(first))

    def fail(self, error: ExpertMeshError) -> None:
        """The engines cannot serve it."""
        self._note(error)

    def take(self, deltas: Sequence[ChoiceDelta]) -> None:
        """The client receives."""
        for delta in deltas:
            choice = self.choices[delta.index]
            choice.text += delta.text
            choice.received += (token.token_id for token in delta.tokens)
            if delta.finish is not None:
                choice.finish = delta.finish.reason.value
            self._note_problem(delta.index, choice.judge_received())
        limit = self.ask.abort_after
        self.has_left = limit is not None and sum(len(c.received) for c in self.choices) >= limit

    def finish(self, error: ExpertMeshError | None, now: float, deadline_s: float) -> None:
        """The client's call has ended."""
        self.is_over = True
        if error is None:
            if not self.has_left and not self.is_right:
                self.problems.append(f"{self.ask.name}: ends with {self.ends}")
            return
        self._note(error)
        is_about_time = isinstance(error, DeadlineExceededError | NotReadyError)
        is_in_time = deadline_s - _ROUNDING_S <= now <= deadline_s + _STILL_S
        self.was_refused = isinstance(error, QueueFullError) and not self.num_tokens
        self.is_late = self.ask.limit_s < REQUEST_LIMIT_S and is_about_time and is_in_time

    def _note(self, error: ExpertMeshError) -> None:
        self.error, self.code = str(error), getattr(error, "code", type(error).__name__)

    def _note_problem(self, place: int, problem: str) -> None:
        if problem:
            name = f"{self.ask.name}.{place}" if place else self.ask.name
            self.problems.append(f"{name}: {problem}")
