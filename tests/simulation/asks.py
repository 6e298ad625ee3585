"""What clients ask for, and what they must get."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tests.simulation.toy_model import Drawing, Prompt, right_beams, right_tokens
from tests.simulation.toy_text import ToyGrammar, token_text
from workers.beams.search import BeamSearch
from workers.requests.request import BeamParams, Grammar, GrammarKind, SamplingParams

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
    adapter: str = ""
    """Name of the adapter that it names as its model."""
    grammar: str = ""
    """See ``ToyGrammar``; empty: none."""
    stop: tuple[str, ...] = ()
    """Strings that end the text of a choice; without any no text is made."""

    def params(self) -> SamplingParams:
        """As the engines get them."""
        return SamplingParams(
            max_tokens=self.max_tokens,
            seed=self.seed,
            stop_token_ids=self.stop_ids,
            top_k=self.top_k,
            beams=self.beams,
            grammar=Grammar(kind=GrammarKind.REGEX, text=self.grammar) if self.grammar else None,
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
    """Why it ends for the client."""
    received: Sequence[int]
    """Tokens that the client gets."""
    text: str = ""


def right_choices(ask: Ask) -> list[RightChoice]:
    """What a request must get, whatever happens, by choice."""
    prompt = Prompt(ask.prompt, ask.cache_salt, ask.adapter)
    if ask.beams is not None:
        return [RightChoice(ids, "stop" if e else "length", ids) for ids, e in _search(ask, prompt)]
    return [_right_choice(ask, prompt, choice) for choice in range(ask.num_choices)]


def _search(ask: Ask, prompt: Prompt) -> list[tuple[list[int], bool]]:
    assert ask.beams is not None
    width, ending = ask.num_choices, frozenset(ask.stop_ids)
    search = BeamSearch(ask.beams, width=width, max_tokens=ask.max_tokens, ending=ending)
    return right_beams(prompt, search, width, ending)


def _right_choice(ask: Ask, prompt: Prompt, choice: int) -> RightChoice:
    grammar = ToyGrammar(ask.grammar) if ask.grammar else None
    tokens = right_tokens(prompt, ask.drawing(choice), ask.max_tokens, grammar)
    ends = (place for place, token in enumerate(tokens) if token in ask.stop_ids)
    last = next(ends, None)
    if last is not None:
        tokens = tokens[: last + 1]
    has_ended = last is not None or (grammar is not None and grammar.is_complete)
    found = RightChoice(tokens, "stop" if has_ended else "length", tokens)
    if not ask.stop:
        return found
    shown = tokens if last is None else tokens[:-1]  # a token that ends the choice has no text
    return _cut_off(found, "".join(map(token_text, shown)), ask.stop)


def _cut_off(found: RightChoice, text: str, stop: Sequence[str]) -> RightChoice:
    """Up to the stop string that ends first, of several the longest."""
    matches = [(text.find(s) + len(s), -len(s)) for s in stop if s in text]
    if not matches:
        return replace(found, text=text)
    end, length = min(matches)
    num_tokens = -(-end // len(token_text(0)))
    return replace(found, end="stop", received=found.tokens[:num_tokens], text=text[: end + length])
