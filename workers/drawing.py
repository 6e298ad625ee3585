"""What a step's final hidden states become: tokens, scores of prompts, classes, inspections.

Nothing here changes a sequence: the engine commits what is found, or drops it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from workers.families.base import BankSpec, ModelConfig
from workers.findings import Piece
from workers.inspector import Inspector
from workers.model_runner import StepResult
from workers.request import TokenLogprob
from workers.sampling import Drawn, all_finite, logprob_entries, sample
from workers.sampling_alone import logprob_entries_alone, sample_alone
from workers.scheduler import Plan, PlannedRows
from workers.sequence import Sequence as RequestSequence
from workers.tracks import NOT_FINITE, Failure, Track

_SCORED_ROWS = 64
"""Prompt rows whose logits are made at a time: 64 x 50304 float32 are 13 MB."""


@dataclass(frozen=True, slots=True)
class StepTokens:
    """What was drawn and scored in a step, before the commit."""

    drawing: list[Track] = field(default_factory=list)
    """Choices whose newest token was in the step: they draw one, or are scored only."""
    drawn: dict[Track, Drawn] = field(default_factory=dict)
    """By choice that drew a token."""
    scored: dict[Track, list[TokenLogprob]] = field(default_factory=dict)
    """New prompt logprobs."""
    failed: dict[Track, Failure] = field(default_factory=dict)
    """Choices that cannot go on; in none of the others."""
    classes: dict[Track, tuple[float, ...]] = field(default_factory=dict)
    """Logits by class, of prompts whose last row was in the step of a classifier."""
    pieces: dict[Track, Piece] = field(default_factory=dict)
    """What was found for inspections."""


class Drawing:
    """Samples and scores the steps of one engine.

    Args:
        config: the model's numbers.
        banks: its expert banks.
        logits: head of the model: [rows, H] -> [rows, V], or classes.
        deterministic: every row in memory of its own.
        tracks: by sequence, those that a plan may have; the engine's own.
    """

    def __init__(
        self,
        config: ModelConfig,
        banks: Sequence[BankSpec],
        logits: Callable[[Tensor], Tensor],
        deterministic: bool,
        tracks: Mapping[RequestSequence, Track],
    ) -> None:
        self._eos = config.eos_token_ids
        self._is_classifier = bool(config.labels)
        self._logits = logits
        self._sample = sample_alone if deterministic else sample
        self._tracks = tracks
        self._score = logprob_entries_alone if deterministic else logprob_entries
        self.inspector = Inspector(config, banks, logits, self._score)
        """What looks inside the model."""

    def draw(self, plan: Plan, result: StepResult) -> StepTokens:
        """Tokens of a plan that ran to its last layer. Changes nothing."""
        tokens = StepTokens()
        ends: dict[Track, int] = {}
        for planned, first_row, is_finite in zip(
            plan.rows, result.first_row, result.finite, strict=True
        ):
            track = self._tracks[planned.sequence]
            if not is_finite or not self._read(tokens, track, planned, first_row, result):
                tokens.failed[track] = NOT_FINITE
            elif planned.draws_token:
                tokens.drawing.append(track)
                ends[track] = first_row + planned.count - 1
        self._draw(tokens, ends, result.hidden)
        self._classify(tokens, ends, result.hidden)
        return tokens

    def _read(
        self,
        tokens: StepTokens,
        track: Track,
        planned: PlannedRows,
        first_row: int,
        result: StepResult,
    ) -> bool:
        """Take what prompt rows tell; False when a logit is NaN or infinity."""
        if track.wants_prompt_logprobs:
            entries = self._score_prompt(track, planned, result.hidden, first_row)
            if entries is None:
                return False
            tokens.scored[track] = entries
        if track.findings is not None:
            hidden = result.hidden[first_row : first_row + planned.count]
            captures = result.captures.get(planned.sequence, ())
            piece = self.inspector.read(planned.sequence.request, planned.first, hidden, captures)
            if piece is None:
                tokens.scored.pop(track, None)
                return False
            tokens.pieces[track] = piece
        return True

    def _score_prompt(
        self, track: Track, planned: PlannedRows, hidden: Tensor, first_row: int
    ) -> list[TokenLogprob] | None:
        """Logprobs of the prompt tokens behind these rows that have none yet.

        None when a logit is NaN or infinity.
        """
        prompt = planned.sequence.request.prompt
        first = max(planned.first, len(track.prompt_logprobs) - 1)
        last = min(planned.first + planned.count, len(prompt) - 1)
        offset = first_row - planned.first
        entries: list[TokenLogprob] = []
        for start in range(first, last, _SCORED_ROWS):
            stop = min(start + _SCORED_ROWS, last)
            logits = self._logits(hidden[start + offset : stop + offset])
            if not all_finite(logits):
                return None
            scored = prompt[start + 1 : stop + 1]
            num_top = [planned.sequence.params.prompt_logprobs or 0] * len(scored)
            entries += self._score(logits, scored, num_top)
        return entries

    def _draw(self, tokens: StepTokens, ends: Mapping[Track, int], hidden: Tensor) -> None:
        """A token for every choice at its end that may have one."""
        sampled = [t for t in tokens.drawing if t.sequence.params.max_tokens]
        if not sampled:
            return
        logits = self._logits(hidden[[ends[track] for track in sampled]])
        found = self._sample(logits, [track.sampling_row(self._eos) for track in sampled])
        for track, one in zip(sampled, found, strict=True):
            if one.failure is None:
                tokens.drawn[track] = one
            else:
                self._fail(tokens, track, track.draw_failure(one))

    def _classify(self, tokens: StepTokens, ends: Mapping[Track, int], hidden: Tensor) -> None:
        """Logits by class of prompts at their ends."""
        if not self._is_classifier or not ends:
            return
        rows: Sequence[list[float]] = self._logits(hidden[list(ends.values())]).float().tolist()
        for track, row in zip(ends, rows, strict=True):
            if not all(map(math.isfinite, row)):
                self._fail(tokens, track, NOT_FINITE)
            elif track.findings is None:  # else all its tokens ran, not those up to a pad
                tokens.classes[track] = tuple(row)

    def _fail(self, tokens: StepTokens, track: Track, failure: Failure) -> None:
        """Take a choice out of those that draw."""
        tokens.drawing.remove(track)
        tokens.failed[track] = failure
