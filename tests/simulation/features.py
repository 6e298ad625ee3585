"""What requests may ask for beside tokens, by name: each seed has about half of it.

A feature changes a part of the requests, drawn from each request's own seed, so that a feature that
is added changes nothing of the others.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence, Set
from dataclasses import replace

from tests.simulation.asks import REQUEST_LIMIT_S, Ask
from tests.simulation.toy_adapters import ADAPTERS
from tests.simulation.toy_model import VOCAB
from tests.simulation.toy_text import LETTERS
from workers.requests.request import BeamParams, EarlyStopping

_SHARE = 0.4
"""Part of the requests that use a feature."""
_STOP_IDS = 40
"""Of ``VOCAB`` tokens: a choice ends at one of 25."""


def with_features(asks: Sequence[Ask], features: Set[str]) -> tuple[Ask, ...]:
    """These requests, some of them with more wishes; each feature is in one at least."""
    salts = itertools.chain([""], map(str, itertools.count()))
    draws = (tuple(with_chance(ask, features, salt) for ask in asks) for salt in salts)
    names = features & USES.keys()
    return next(drawn for drawn in draws if all(any(map(USES[name], drawn)) for name in names))


def with_chance(ask: Ask, features: Set[str], salt: str = "") -> Ask:
    """A request, with more wishes if chance will; another ``salt`` is another chance."""
    for name in sorted(features):
        rng = random.Random(f"{name} {ask.name} {ask.seed}{salt}")
        change = FEATURES[name]
        if change is not None and rng.random() < _SHARE:
            ask = change(ask, rng)
    return ask


def _choices(ask: Ask, rng: random.Random) -> Ask:
    """Several choices, which end at tokens of their own."""
    stop_ids = tuple(rng.sample(range(VOCAB), _STOP_IDS)) if rng.random() < 0.7 else ()
    return replace(ask, num_choices=rng.choice((2, 2, 3, 4)), stop_ids=stop_ids)


def _turns(ask: Ask, rng: random.Random) -> Ask:
    """A conversation of several turns, whose blocks are wanted again."""
    turns = [tuple(rng.choices(range(VOCAB), k=rng.randint(1, 8))) for _ in range(3)]
    return replace(
        ask,
        session=f"session of {ask.name}",
        turns=tuple(turns[: rng.randint(1, 3)]),
        pause_s=rng.choice((0.02, 0.5, 2.0)),
        max_tokens=rng.randint(4, 12),
        abort_after=None,
        limit_s=REQUEST_LIMIT_S,
    )


def _long_turns(ask: Ask, rng: random.Random) -> Ask:
    """A conversation whose blocks have given way to others before they are wanted again."""
    return replace(_turns(ask, rng), pause_s=rng.choice((0.5, 2.0, 4.0)))


def _repetitive(ask: Ask, rng: random.Random) -> Ask:
    """An output of few tokens, so that guesses at the next ones are right now and then."""
    return replace(ask, top_k=rng.choice((2, 2, 3)), stop_ids=(), beams=None)


def _beams(ask: Ask, rng: random.Random) -> Ask:
    """The most probable outputs, which a search finds."""
    return replace(
        ask,
        num_choices=rng.choice((1, 2, 3, 4)),
        stop_ids=tuple(rng.sample(range(VOCAB), 2 * _STOP_IDS)) if rng.random() < 0.7 else (),
        beams=BeamParams(
            length_penalty=rng.choice((0.0, 1.0, 2.0)),
            early_stopping=rng.choice(tuple(EarlyStopping)),
        ),
        max_tokens=rng.randint(2, 10),
        abort_after=None,
        turns=(),
    )


def _adapter(ask: Ask, rng: random.Random) -> Ask:
    """Computed with an adapter."""
    return replace(ask, adapter=rng.choice(sorted(ADAPTERS)))


def _grammar(ask: Ask, rng: random.Random) -> Ask:
    """An output that follows a grammar, or ends at a string, or both."""
    has_grammar, has_stop = rng.choice(((True, False), (False, True), (True, True)))
    stop = ("".join(rng.choices(LETTERS, k=rng.choice((2, 3, 3, 4)))) for _ in range(3))
    return replace(
        ask,
        grammar=str(rng.randrange(1000)) if has_grammar else "",
        stop=tuple(stop) if has_stop else (),
        top_k=0,
        beams=None,
    )


FEATURES: dict[str, Callable[[Ask, random.Random], Ask] | None] = {
    "adapters": _adapter,
    "beams": _beams,
    "choices": _choices,
    "drafts": _repetitive,
    "grammars": _grammar,
    "groups": None,
    "restarts": None,
    "state": None,
    "tiers": _turns,
    "tiers_on_disk": _long_turns,
}
"""What each changes of a request; None: of the cluster alone."""

USES: dict[str, Callable[[Ask], bool]] = {
    "adapters": lambda ask: bool(ask.adapter),
    "beams": lambda ask: ask.beams is not None,
    "choices": lambda ask: ask.num_choices > 1,
    "drafts": lambda ask: ask.top_k > 0,
    "grammars": lambda ask: bool(ask.grammar or ask.stop),
    "tiers": lambda ask: bool(ask.session),
}
"""By feature that requests have, whether one has it."""
