"""What clients ask for, and what they must get."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tests.simulation.toy_model import Drawing, right_tokens

REQUEST_LIMIT_S = 120.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """One request of a client."""

    name: str
    gateway: int
    at_s: float
    prompt: tuple[int, ...]
    max_tokens: int
    seed: int
    cache_salt: str = ""
    abort_after: int | None = None
    """Tokens after which the client leaves."""
    limit_s: float = REQUEST_LIMIT_S
    """The client's own limit."""
    num_choices: int = 1
    stop_ids: tuple[int, ...] = ()
    """Tokens that end a choice."""

    def drawing(self, choice: int) -> Drawing:
        """How the tokens of a choice are drawn."""
        return Drawing(seed=self.seed, choice=choice)


@dataclass(frozen=True, slots=True)
class RightChoice:
    """What a choice must be."""

    tokens: Sequence[int]
    """Those that the engines find."""
    end: str
    """Why it ends."""

    @property
    def received(self) -> Sequence[int]:
        """Tokens that the client gets."""
        return self.tokens


def right_choices(ask: Ask) -> list[RightChoice]:
    """What a request must get, whatever happens, by choice."""
    return [_right_choice(ask, choice) for choice in range(ask.num_choices)]


def _right_choice(ask: Ask, choice: int) -> RightChoice:
    drawn = right_tokens(ask.prompt, ask.cache_salt, ask.drawing(choice), ask.max_tokens)
    ends = (place for place, token in enumerate(drawn) if token in ask.stop_ids)
    last = next(ends, None)
    if last is None:
        return RightChoice(drawn, "length")
    return RightChoice(drawn[: last + 1], "stop")
