"""Guesses the tokens of an engine's sequences, and decides which guesses to run as drafts. Pure.

A guess is cheap to make, so every guess is compared with the sampled token, even if no row was
computed for it. A sequence with bad guesses thus gets draft rows again as soon as they are worth
their cost.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from cluster.config.speculation import SpeculationSection
from workers.requests.request import Request
from workers.requests.sequence import SequenceState
from workers.speculation.acceptance import Acceptance
from workers.speculation.ngram import NgramIndex
from workers.speculation.step_cost import StepCosts

logger = logging.getLogger(__name__)

_MAX_INDEXED_PER_STEP = 4096
"""Maximum number of tokens that a step adds to a sequence's n-gram index, in about a
millisecond."""


_PROBE_INTERVAL = 8
"""Number of output tokens between two predictions for a sequence if its guesses are not worth their
cost; these predictions measure the acceptance rate."""


@dataclass(slots=True)
class _SequenceGuesses:
    """Newest guess for one sequence, and the acceptance rate of its guesses."""

    index: NgramIndex
    acceptance: Acceptance = field(default_factory=Acceptance)
    guess: tuple[int, ...] = ()
    """Tokens that were guessed when the output had ``guessed_after`` tokens."""
    guessed_after: int = -1


class Speculator:
    """Guesses of next tokens, for the engine's thread. Other threads may only call ``stats``."""

    def __init__(
        self, section: SpeculationSection, max_model_len: int, eos_token_ids: Collection[int]
    ) -> None:
        self._section = section
        self._max_model_len = max_model_len
        self._eos = frozenset(eos_token_ids)
        self._guesses: dict[SequenceState, _SequenceGuesses] = {}
        self._costs = StepCosts()
        self._num_sequences = 1
        self._price = self._costs.of(1).price(1)
        self._num_elsewhere = 0
        self._num_planned = 0
        self._reported: set[str] = set()  # reasons why requests have no guesses
        self._num_drafts = self._num_tokens = self._num_withheld = 0
        self._accepted = [0] * section.max_draft_tokens  # by position in the draft

    def plan_step(self, num_sequences: int) -> None:
        """Begin to plan a step in which ``num_sequences`` sequences, at least one, decode."""
        self._num_sequences = count = num_sequences + self._num_elsewhere
        self._price = self._costs.of(count).price(count)
        self._num_planned += 1

    def draft(self, sequence: SequenceState) -> tuple[int, ...]:
        """Return the draft tokens to run after a sequence's newest token; empty if not worth their
        cost.

        The result is the same until the sequence's output grows, or ``plan_step`` or
        ``note_prediction`` is called.
        """
        followed = self._current_guesses(sequence)
        if followed is None or not followed.guess:
            return ()
        guess = followed.guess
        return guess[: followed.acceptance.num_worthwhile(self._price, len(guess))]

    def draft_all(
        self, sequences: Sequence[SequenceState], max_tokens: int
    ) -> list[tuple[int, ...]]:
        """Return the draft tokens of all sequences, at most ``max_tokens`` together.

        If there are more, the tokens with the highest probability of acceptance are kept. Among
        equally likely tokens, successive steps prefer different sequences.
        """
        drafts = [self.draft(sequence) for sequence in sequences]
        if sum(map(len, drafts)) <= max_tokens:
            return drafts
        count = len(sequences)
        ranked = sorted(
            (
                -(self._guesses[sequence].acceptance.share ** (n + 1)),
                (i + self._num_planned) % count,
                i,
            )
            for i, (sequence, draft) in enumerate(zip(sequences, drafts, strict=True))
            for n in range(len(draft))
        )
        kept = Counter(i for *_, i in ranked[:max_tokens])
        return [draft[: kept[i]] for i, draft in enumerate(drafts)]

    def commit(self, sequence: SequenceState, drafts: Sequence[int], tokens: Sequence[int]) -> None:
        """Record that a decode with ``drafts`` resulted in ``tokens``, which are already in the
        output."""
        followed = self._guesses.get(sequence)
        if followed is None:
            return
        num_before = len(sequence.output) - len(tokens)
        if drafts:
            self._count(followed, len(drafts), len(tokens) - 1)
        elif followed.guess and tokens and followed.guessed_after == num_before:
            self._num_withheld += not followed.acceptance.num_worthwhile(self._price, 1)
            is_right = followed.guess[0] == tokens[0]
            followed.acceptance.note(int(is_right), int(not is_right))

    def wants_prediction(self, sequence: SequenceState) -> bool:
        """Whether to compute the model's prediction layer for a sequence.

        The result is True if the guess would be run as a draft, and for few other guesses, which
        only measure the acceptance rate.
        """
        followed = self._find(sequence)
        if followed is None:
            return False
        is_probe = len(sequence.output) % _PROBE_INTERVAL == 0
        return is_probe or followed.acceptance.num_worthwhile(self._price, 1) > 0

    def note_prediction(self, sequence: SequenceState, token: int) -> None:
        """Record the token that the model's prediction layer expects after the output."""
        followed = self._find(sequence)
        if followed is not None:
            followed.guess = self._cut(sequence, (token,))
            followed.guessed_after = len(sequence.output)

    def observe_step(self, num_rows: int, num_elsewhere: int, seconds: float) -> None:
        """Record the time of a decode step. ``num_rows``: rows of all ranks, including drafts;
        ``num_elsewhere``: decoding sequences of other ranks."""
        self._num_elsewhere = num_elsewhere
        self._costs.of(self._num_sequences).observe(num_rows, seconds)

    def forget(self, sequence: SequenceState) -> None:
        """Remove the guesses of an ended sequence."""
        self._guesses.pop(sequence, None)

    def stats(self) -> dict[str, float]:
        """Return counters, and a gauge of a row's price, by metric name without prefix. Any
        thread may call it."""
        by_place = {
            f'spec_decode_num_accepted_tokens_per_pos_total{{position="{position}"}}': float(count)
            for position, count in enumerate(self._accepted)
        }
        return {
            "spec_decode_num_drafts_total": float(self._num_drafts),
            "spec_decode_num_draft_tokens_total": float(self._num_tokens),
            "spec_decode_num_accepted_tokens_total": float(sum(self._accepted)),
            **by_place,
            "spec_decode_num_withheld_drafts_total": float(self._num_withheld),
            "spec_decode_row_price": self._price,
        }

    def _count(self, followed: _SequenceGuesses, num_drafted: int, num_accepted: int) -> None:
        self._num_drafts += 1
        self._num_tokens += num_drafted
        for position in range(num_accepted):
            self._accepted[position] += 1
        followed.acceptance.note(num_accepted, int(num_accepted < num_drafted))

    def _current_guesses(self, sequence: SequenceState) -> _SequenceGuesses | None:
        """Return a sequence's guesses after updating them; None if its request gets no guesses."""
        followed = self._find(sequence)
        if followed is not None and followed.guessed_after != len(sequence.output):
            followed.guessed_after = len(sequence.output)
            followed.guess = self._guess(sequence, followed.index)
        return followed

    def _find(self, sequence: SequenceState) -> _SequenceGuesses | None:
        followed = self._guesses.get(sequence)
        if followed is None:
            reason = unsupported(sequence.request)
            if reason:
                self._report(reason)
                return None
            section = self._section
            followed = _SequenceGuesses(NgramIndex(section.ngram_min, section.ngram_max))
            self._guesses[sequence] = followed
        return followed

    def _guess(self, sequence: SequenceState, index: NgramIndex) -> tuple[int, ...]:
        """Guess from the sequence's n-grams; empty if a prediction layer guesses instead, or while
        the index lacks tokens of the sequence."""
        if self._section.has_predictor:
            return ()
        first, last = len(index), sequence.num_tokens
        index.extend(sequence.tokens(first, min(last, first + _MAX_INDEXED_PER_STEP)))
        if len(index) < last:
            return ()
        guess = index.guess(self._section.max_draft_tokens)
        return self._cut(sequence, guess) if guess else ()

    def _cut(self, sequence: SequenceState, guess: tuple[int, ...]) -> tuple[int, ...]:
        """Cut a guess before the token with which the output would end."""
        left = sequence.params.max_tokens - len(sequence.output)
        left = min(left, self._max_model_len - sequence.num_tokens)
        guess = guess[: max(left - 1, 0)]
        ends = self._eos.union(sequence.params.stop_token_ids)
        stop = next((index for index, token in enumerate(guess) if token in ends), None)
        return guess[:stop]  # the output would end there, so no row must follow

    def _report(self, reason: str) -> None:
        if reason not in self._reported:
            self._reported.add(reason)
            logger.info("no speculative decoding for requests with %s", reason)


def unsupported(request: Request) -> str:
    """Return the feature of a request with which no guesses are made; empty if there is none."""
    if request.params.grammar is not None:
        return "a grammar"
    if request.params.beams is not None:
        return "beams"
    if request.prompt_embeds is not None:
        return "embeddings as a prompt"
    return ""
