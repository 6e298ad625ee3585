"""What clients ask for, and what they must get."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tests.simulation.toy_model import Drawing, right_beams, right_tokens
from workers.beams.search import BeamSearch
from workers.requests.request import BeamParams, SamplingParams

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
    session: str = ""
    """Name of the conversation that it is a turn of."""
    turns: tuple[tuple[int, ...], ...] = ()
    """What the client adds in each of the later turns."""
    pause_s: float = 0.0
    """Time between the end of a turn and the next one."""

    top_k: int = 0
    """See ``Drawing``."""
    beams: BeamParams | None = None
    """Its choices are what a search finds."""

    def params(self) -> SamplingParams:
        """As the engines get them."""
        return SamplingParams(
            max_tokens=self.max_tokens,
            seed=self.seed,
            stop_token_ids=self.stop_ids,
            top_k=self.top_k,
            beams=self.beams,
        )

    def drawing(self, choice: int) -> Drawing:
        """How the tokens of a choice are drawn."""
        return Drawing(seed=self.seed, choice=choice, top_k=self.top_k)


def next_turn(ask: Ask, answer: Sequence[int], max_tokens: int) -> Ask | None:
    """The next turn of a conversation; None behind the last, or where it would have too many
    tokens.
    """
    if not ask.turns:
        return None
    prompt = (*ask.prompt, *answer, *ask.turns[0])
    if len(prompt) + ask.max_tokens > max_tokens:
        return None
    return replace(
        ask,
        name=f"{ask.name}+",
        gateway=ask.gateway + 1,
        at_s=ask.pause_s,
        prompt=prompt,
        seed=ask.seed + 1,
        turns=ask.turns[1:],
    )


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
    if ask.beams is not None:
        return [RightChoice(tokens, "stop" if e else "length") for tokens, e in _search(ask)]
    return [_right_choice(ask, choice) for choice in range(ask.num_choices)]


def _search(ask: Ask) -> list[tuple[list[int], bool]]:
    assert ask.beams is not None
    width, ending = ask.num_choices, frozenset(ask.stop_ids)
    search = BeamSearch(ask.beams, width=width, max_tokens=ask.max_tokens, ending=ending)
    return right_beams(ask.prompt, ask.cache_salt, search, width, ending)


def _right_choice(ask: Ask, choice: int) -> RightChoice:
    drawn = right_tokens(ask.prompt, ask.cache_salt, ask.drawing(choice), ask.max_tokens)
    ends = (place for place, token in enumerate(drawn) if token in ask.stop_ids)
    last = next(ends, None)
    if last is None:
        return RightChoice(drawn, "length")
    return RightChoice(drawn[: last + 1], "stop")
