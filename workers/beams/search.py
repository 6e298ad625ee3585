"""Which outputs a beam search keeps. Pure: the candidates of a step in, the beams of the next out.

Source: ``_beam_search`` of transformers' ``generation/utils.py`` (release 5). Each step ranks the
continuations of all beams by log-probability. Of the best, as many as there are beams, those that
end the text are kept as ended, if they are among the best by score; the beams of the next step are
the best that do not end it. The order of equal ones is defined here: the better beam first, then
the lower token.

    2 beams of log-probability -1.0 and -1.2, continuations by token (2 is eos):
        beam 0: 7 -0.1, 2 -0.4        beam 1: 5 -0.1, 2 -3.0
        ranks:  -1.1 (0, 7)   -1.3 (1, 5)   -1.4 (0, eos)   -4.2 (1, eos)
    no text ends, as no eos is among the best two; the next beams are (0, 7) and (1, 5)
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from itertools import islice

from workers.requests.request import BeamParams, EarlyStopping, TokenLogprob


@dataclass(frozen=True, slots=True, eq=False)
class Path:
    """Tokens of an output, newest first; beams share those that they have in common."""

    newest: TokenLogprob | None = None
    """None before the first."""
    before: Path | None = None
    total: float = 0.0
    """Log-probability of all tokens."""
    length: int = 0
    """Number of tokens."""

    def add(self, token: TokenLogprob) -> Path:
        """This path and one token more."""
        return Path(token, self, self.total + token.logprob, self.length + 1)

    def tokens(self) -> tuple[TokenLogprob, ...]:
        """All tokens, the first one first."""
        found: list[TokenLogprob] = []
        path: Path | None = self
        while path is not None and path.newest is not None:
            found.append(path.newest)
            path = path.before
        return tuple(reversed(found))


@dataclass(frozen=True, slots=True)
class EndedBeam:
    """An output that is complete."""

    path: Path
    score: float
    """Its log-probability over its length to the power of ``length_penalty``."""


@dataclass(frozen=True, slots=True)
class NextBeam:
    """A beam of the next step."""

    parent: int
    """Place of the beam that it continues."""
    token: int
    """What it adds."""


class BeamSearch:
    """The beams of one request.

    Args:
        params: of the search.
        width: number of beams. A single one takes the best token each time, and ends with the
            first token that ends the text, as transformers does.
        max_tokens: tokens of an output at most.
        ending: tokens that end the text.
    """

    def __init__(
        self, params: BeamParams, *, width: int, max_tokens: int, ending: Set[int]
    ) -> None:
        self._params = params
        self._width = width
        self._max_tokens = max_tokens
        self._ending = ending
        self._running = [Path()]
        self.ended: list[EndedBeam] = []
        """The best of those that are complete, by score; as many as there are beams at the end."""
        self.is_over = False

    @property
    def num_running(self) -> int:
        """Beams that are not complete."""
        return len(self._running)

    def advance(self, candidates: Sequence[Sequence[TokenLogprob]]) -> list[NextBeam]:
        """One step; the beams after it, the best first, none at the end.

        ``candidates`` of each beam in its order: its most probable tokens, as many as there are
        beams, and as many of those that do not end the text.
        """
        ranked = sorted(
            (-(path.total + token.logprob), place, token.token_id, token)
            for place, path in enumerate(self._running)
            for token in candidates[place]
        )
        is_last = self._running[0].length + 1 >= self._max_tokens
        ended = [
            (place, token)
            for _, place, token_id, token in ranked[: self._width]
            if is_last or token_id in self._ending
        ]
        self._keep([self._running[place].add(token) for place, token in ended])
        open_ones = ((p, t) for _, p, token_id, t in ranked if token_id not in self._ending)
        chosen = [] if is_last else list(islice(open_ones, self._width))
        self._running = [self._running[place].add(token) for place, token in chosen]
        self.is_over = not chosen or self._ends_now()
        return [] if self.is_over else [NextBeam(p, token.token_id) for p, token in chosen]

    def _keep(self, paths: Sequence[Path]) -> None:
        """Complete outputs: the best stay."""
        found = [EndedBeam(path, self._score(path.total, path.length)) for path in paths]
        self.ended = sorted([*self.ended, *found], key=lambda one: -one.score)[: self._width]

    def _score(self, total: float, length: int) -> float:
        divisor: float = length**self._params.length_penalty
        return total / divisor

    def _ends_now(self) -> bool:
        """Whether there are enough ended outputs, and the best beam would not be among them."""
        if len(self.ended) < self._width:
            return False
        params, best = self._params, self._running[0]
        if params.early_stopping is EarlyStopping.FULL or self._width == 1:
            return True
        can_grow = params.early_stopping is EarlyStopping.NEVER and params.length_penalty > 0
        length = self._max_tokens if can_grow else best.length
        return self._score(best.total, length) <= self.ended[-1].score
