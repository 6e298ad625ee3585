"""The beam search algorithm, which turns a step's candidates into the next beams. Pure.

Source: ``_beam_search`` of transformers' ``generation/utils.py`` (release 5). Each step ranks the
continuations of all beams by log-probability. A continuation that ends the text becomes an ended
output if it is among the first ``width`` and its score is among the best. The next beams are the
best continuations that do not end the text. Unlike in transformers, ties are broken by the better
beam, then by the lower token id.

    2 beams of log-probability -1.0 and -1.2, continuations by token (2 is eos):
        beam 0: 7 -0.1, 2 -0.4        beam 1: 5 -0.1, 2 -3.0
        ranks:  -1.1 (0, 7)   -1.3 (1, 5)   -1.4 (0, eos)   -4.2 (1, eos)
    no output ends, as no eos is among the best two; the next beams are (0, 7) and (1, 5)
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from itertools import islice

from workers.requests.request import BeamParams, EarlyStopping, TokenLogprob


@dataclass(frozen=True, slots=True, eq=False)
class TokenPath:
    """Output tokens of a beam as a linked list, newest first; beams share their common prefix."""

    newest: TokenLogprob | None = None
    """Newest token of the output; None for an empty output."""
    before: TokenPath | None = None
    total: float = 0.0
    """Log-probability of the output: sum over all tokens."""
    length: int = 0
    """Number of tokens in the output."""

    def add(self, token: TokenLogprob) -> TokenPath:
        """Return a new path: this path extended by a token."""
        return TokenPath(token, self, self.total + token.logprob, self.length + 1)

    def tokens(self) -> tuple[TokenLogprob, ...]:
        """Return all tokens of the output, oldest first."""
        newest_first: list[TokenLogprob] = []
        path: TokenPath | None = self
        while path is not None and path.newest is not None:
            newest_first.append(path.newest)
            path = path.before
        return tuple(reversed(newest_first))


@dataclass(frozen=True, slots=True)
class EndedBeam:
    """A complete output of a beam search, with its score."""

    path: TokenPath
    score: float
    """Score of the output: log-probability divided by length ** ``length_penalty``."""


@dataclass(frozen=True, slots=True)
class NextBeam:
    """A beam of the next step: a beam of the previous step, continued by one token."""

    parent: int
    """Index of the continued beam among the beams of the previous step."""
    token: int
    """Id of the token that continues the beam."""


class BeamSearch:
    """The beam search of one request: its running beams and complete outputs, without sequences.

    Args:
        params: parameters of the search.
        width: number of beams. With 1, each step takes the best token, and the search ends with
            the first token that ends the text, as in transformers.
        max_tokens: maximum number of tokens of an output.
        ending: tokens that end the text.
    """

    def __init__(
        self, params: BeamParams, *, width: int, max_tokens: int, ending: Set[int]
    ) -> None:
        self._params = params
        self._width = width
        self._max_tokens = max_tokens
        self._ending = ending
        self._running = [TokenPath()]
        self.ended: list[EndedBeam] = []
        """Best complete outputs so far, at most ``width``, the best score first."""
        self.is_over = False

    @property
    def num_running(self) -> int:
        """Number of running beams."""
        return len(self._running)

    def advance(self, candidates: Sequence[Sequence[TokenLogprob]]) -> list[NextBeam]:
        """Run one step of the search; return the next beams, the best first.

        The result is empty if the search has ended. ``candidates``: for each beam in order, its
        ``width`` most probable tokens and its ``width`` most probable tokens that do not end the
        text.
        """
        ranked = sorted(
            (-(path.total + token.logprob), index, token.token_id, token)
            for index, path in enumerate(self._running)
            for token in candidates[index]
        )
        is_last = self._running[0].length + 1 >= self._max_tokens
        ended = [
            (index, token)
            for _, index, token_id, token in ranked[: self._width]
            if is_last or token_id in self._ending
        ]
        self._keep([self._running[index].add(token) for index, token in ended])
        open_ones = ((p, t) for _, p, token_id, t in ranked if token_id not in self._ending)
        chosen = [] if is_last else list(islice(open_ones, self._width))
        self._running = [self._running[index].add(token) for index, token in chosen]
        self.is_over = not chosen or self._ends_now()
        return [] if self.is_over else [NextBeam(p, token.token_id) for p, token in chosen]

    def _keep(self, paths: Sequence[TokenPath]) -> None:
        """Add complete outputs to ``ended``, and keep only the ``width`` best outputs."""
        ended = [EndedBeam(path, self._score(path.total, path.length)) for path in paths]
        self.ended = sorted([*self.ended, *ended], key=lambda one: -one.score)[: self._width]

    def _score(self, total: float, length: int) -> float:
        divisor: float = length**self._params.length_penalty
        return total / divisor

    def _ends_now(self) -> bool:
        """Whether the search ends: ``width`` outputs are complete, and by the rule of
        ``early_stopping`` no running beam can displace one of them."""
        if len(self.ended) < self._width:
            return False
        params, best = self._params, self._running[0]
        if params.early_stopping is EarlyStopping.FULL or self._width == 1:
            return True
        can_grow = params.early_stopping is EarlyStopping.NEVER and params.length_penalty > 0
        length = self._max_tokens if can_grow else best.length
        return self._score(best.total, length) <= self.ended[-1].score
