"""Turns a step's final hidden states into tokens, prompt logprobs, classes and inspections.

This module changes no sequence; the engine commits the results or drops them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from workers.beams.candidates import (
    CandidateParams,
    beam_candidates,
    beam_candidates_by_row,
)
from workers.beams.group import ending_tokens
from workers.engine.step_result import StepResult
from workers.inspection.buffers import StepRows
from workers.inspection.inspector import Inspector
from workers.model.config import BankSpec, ModelConfig
from workers.model.host_copies import to_host
from workers.native.thread_team import ThreadTeam
from workers.requests.request import TokenLogprob
from workers.requests.sequence import NOT_FINITE, Failure, SequenceState
from workers.sampling.best_tokens import best_tokens
from workers.sampling.grammar import GrammarState
from workers.sampling.logits_processors import LogitsProcessors, SamplingRow
from workers.sampling.sampler import (
    SampledToken,
    SamplingFailure,
    all_finite,
    logprob_entries,
    logprob_entries_by_row,
    sample_tokens,
    sampled_tokens,
    select_rows,
)
from workers.scheduling.step_plan import PlannedRows, StepPlan
from workers.speculation.acceptance import num_accepted

_SCORED_ROWS = 64
"""Maximum prompt rows whose logits are computed at a time: 64 x 50304 float32 are 13 MB."""


@dataclass(frozen=True, slots=True)
class StepTokens:
    """Tokens and scores that a step has computed, before they are committed."""

    complete: dict[SequenceState, int] = field(default_factory=dict)
    """Sequences with a row of their newest token in the step, and the index of this row."""
    drawn: dict[SequenceState, list[SampledToken]] = field(default_factory=dict)
    """Tokens sampled for each sequence: one after its newest token, then one after each accepted
    draft."""
    scored: dict[SequenceState, list[TokenLogprob]] = field(default_factory=dict)
    failed: dict[SequenceState, Failure] = field(default_factory=dict)
    """Sequences that fail, with their errors; they are not in ``complete``, ``drawn`` and
    ``candidates``."""
    classes: dict[SequenceState, tuple[float, ...]] = field(default_factory=dict)
    """Class logits of each prompt whose last row was in the step; for classifier models only."""
    inspected: dict[SequenceState, StepRows] = field(default_factory=dict)
    broken: list[PlannedRows] = field(default_factory=list)
    """Plan entries with drafts in which any row, even of a rejected draft, has NaN or infinity."""
    candidates: dict[SequenceState, list[TokenLogprob]] = field(default_factory=dict)
    """Candidate next tokens of each beam in ``complete``; ignore its entry in ``drawn``."""
    predicted: dict[SequenceState, int] = field(default_factory=dict)
    """For each sequence, the token that the model's prediction layer expects after the sampled
    tokens."""


@dataclass(frozen=True, slots=True)
class _SampledRows:
    """Consecutive rows of a step from which tokens of one sequence are sampled."""

    sequence: SequenceState
    first: int
    """Row of the sequence's newest token; the rows of the drafts follow."""
    drafts: tuple[int, ...]

    @property
    def row_indices(self) -> range:
        """Row indices of the sequence's newest token and of its drafts."""
        return range(self.first, self.first + 1 + len(self.drafts))


@dataclass(frozen=True, slots=True)
class _SampledLogits:
    """Rows of logits, with the sampling parameters and the sampled token of each row."""

    logits: Tensor | None
    """None if nothing is read except the tokens."""
    rows: Sequence[SamplingRow]
    tokens: Sequence[int]


class StepSampler:
    """Samples and scores the steps of one engine.

    Args:
        config: the model's configuration.
        banks: the model's expert banks.
        logits: the head of the model: [rows, H] -> [rows, V], or [rows, classes].
        is_exact: whether a row's result must not depend on other rows, so that logprobs and beam
            candidates of each row are computed alone.
        team: threads of the native sampling kernel; None: torch samples.
    """

    def __init__(
        self,
        config: ModelConfig,
        banks: Sequence[BankSpec],
        logits: Callable[[Tensor], Tensor],
        is_exact: bool,
        team: ThreadTeam | None = None,
    ) -> None:
        self._eos = config.eos_token_ids
        self._is_classifier = bool(config.labels)
        self._logits = logits
        self._score = logprob_entries_by_row if is_exact else logprob_entries
        self._candidates = beam_candidates_by_row if is_exact else beam_candidates
        self._team = team
        self._processors: dict[SequenceState, LogitsProcessors] = {}
        self._mask_thread = ThreadPoolExecutor(1, "grammar-masks")
        self.inspector = Inspector(config, banks, logits, self._score)
        """Reads internal tensors of the model for requests that inspect them."""

    def start(self, sequence: SequenceState, grammar: GrammarState | None) -> None:
        """Track a sequence until ``end``. ``grammar``: its own state; None without a grammar."""
        self._processors[sequence] = LogitsProcessors(sequence, self._eos, grammar)
        self.inspector.start(sequence)

    def end(self, sequence: SequenceState) -> None:
        del self._processors[sequence]
        self.inspector.end(sequence)

    def prepare(self, plan: StepPlan) -> None:
        """Start to compute a plan's grammar masks on another thread; ``sample`` waits for them."""
        for planned in plan.rows:
            sequence, is_last = planned.sequence, planned.is_decode or planned.samples_token
            grammar = self._processors[sequence].grammar
            if grammar is not None and is_last and sequence.params.max_tokens:
                grammar.prepare(self._mask_thread)

    def is_drawn_only(self, sequence: SequenceState) -> bool:
        """Whether steps compute nothing for a sequence but tokens drawn from plain logits, until it
        ends."""
        request, params = sequence.request, sequence.params
        is_read = request.inspection is not None or self._is_classifier
        is_scored = params.logprobs is not None or params.beams is not None
        return not (is_read or is_scored) and self._processors[sequence].stays_plain

    def sample(self, plan: StepPlan, result: StepResult) -> StepTokens:
        """Sample the tokens of a plan that ran to the model's last layer.

        Also scores, inspects and classifies prompt rows. Changes no sequence. Raises
        ``TransportError`` if messages of the step are lost.
        """
        tokens = StepTokens()
        for planned, first_row in zip(plan.rows, result.first_row, strict=True):
            sequence = planned.sequence
            is_asked = sequence.scores_prompt or sequence.request.inspection is not None
            reads = is_asked and not planned.is_decode
            if reads and not self._read_prompt_rows(tokens, planned, first_row, result):
                tokens.failed[sequence] = NOT_FINITE
            elif planned.is_decode or planned.samples_token:
                tokens.complete[sequence] = first_row + planned.count - len(planned.drafts) - 1
        self._sample(tokens, plan, result)
        self._classify(tokens, result.hidden)
        return tokens

    def predict(
        self,
        plan: StepPlan,
        result: StepResult,
        predicted: Tensor,
        drawn: Mapping[SequenceState, Sequence[int]],
    ) -> dict[SequenceState, int]:
        """Return for each sequence in ``drawn`` the token expected after its sampled tokens.

        predicted [num_rows, H]: hidden states of the model's prediction layer, in the order of
        ``result.hidden``. drawn: tokens sampled in the step.
        """
        row_of = {}
        for planned, first_row in zip(plan.rows, result.first_row, strict=True):
            if new := drawn.get(planned.sequence):
                newest = first_row + planned.count - len(planned.drafts) - 1
                row_of[planned.sequence] = newest + len(new) - 1
        if not row_of:
            return {}
        ordered = sorted(row_of, key=row_of.__getitem__)
        rows = [row_of[sequence] for sequence in ordered]
        (ids,) = to_host([best_tokens(self._logits(select_rows(predicted, rows)))])
        return dict(zip(ordered, ids.tolist(), strict=True))

    def _read_prompt_rows(
        self, tokens: StepTokens, planned: PlannedRows, first_row: int, result: StepResult
    ) -> bool:
        """Score and inspect the prompt rows of a plan entry; add the results to ``tokens``.

        Returns False if a hidden state or a logit is NaN or infinity.
        """
        sequence = planned.sequence
        result.finish()
        if not result.finite[first_row : first_row + planned.count].all():  # device-to-host sync
            return False
        if sequence.scores_prompt:
            entries = self._score_prompt(planned, result.hidden, first_row)
            if entries is None:
                return False
            tokens.scored[sequence] = entries
        if sequence.request.inspection is not None:
            hidden = result.hidden[first_row : first_row + planned.count]
            captures = result.captures.get(sequence, ())
            rows_found = self.inspector.read(sequence.request, planned.first, hidden, captures)
            if rows_found is None:
                return False
            tokens.inspected[sequence] = rows_found
        return True

    def _score_prompt(
        self, planned: PlannedRows, hidden: Tensor, first_row: int
    ) -> list[TokenLogprob] | None:
        """Return the logprobs of the prompt tokens that follow the planned rows' tokens.

        Tokens that were scored in earlier steps are skipped. None if a logit is NaN or infinity.
        """
        sequence = planned.sequence
        prompt = sequence.request.prompt
        first = max(planned.first, len(sequence.prompt_logprobs) - 1)
        last = min(planned.first + planned.count, len(prompt) - 1)
        offset = first_row - planned.first
        entries: list[TokenLogprob] = []
        for start in range(first, last, _SCORED_ROWS):
            stop = min(start + _SCORED_ROWS, last)
            logits = self._logits(hidden[start + offset : stop + offset])
            if not all_finite(logits):
                return None
            scored = prompt[start + 1 : stop + 1]
            num_top = [sequence.params.prompt_logprobs or 0] * len(scored)
            entries += self._score(logits, scored, num_top)
        return entries

    def _sample(self, tokens: StepTokens, plan: StepPlan, result: StepResult) -> None:
        """Sample tokens for every sequence in ``tokens.complete``.

        Sequences whose rows contain NaN or infinity fail. Tokens and ``finite`` flags are copied to
        the host together, so the step synchronizes once.
        """
        sampled = self._rows_to_sample(tokens.complete, plan)
        rows = [row for one in sampled for row in self._processors[one.sequence].rows(one.drafts)]
        row_indices = [row_index for one in sampled for row_index in one.row_indices]
        drawn = result.drawn
        is_drawn = drawn is not None and all(row.is_plain for row in rows)
        reads_logits = not is_drawn or any(
            row.params.logprobs is not None or row.params.beams is not None for row in rows
        )
        logits = self._logits_of(row_indices, result) if sampled and reads_logits else None
        result.finish()  # sampling may read values from the device
        if drawn is not None and is_drawn:
            (both,) = to_host([drawn])
            ids, is_finite = [both[row_indices, 0]], both[:, 1] != 0
        else:
            own = None if drawn is None else select_rows(drawn[:, 0], row_indices)
            tokens_of = () if logits is None else (sample_tokens(logits, rows, self._team, own),)
            is_finite, *ids = to_host([result.finite, *tokens_of])
        if not is_finite.all():
            self._fail_broken(tokens, plan, result, is_finite)
        if not sampled:
            return
        new, kept, begin = ids[0].tolist(), [], 0
        for one in sampled:
            accepted, end = 0, begin + 1 + len(one.drafts)
            if one.drafts:
                finite = is_finite[one.first : one.first + end - begin].tolist()
                accepted = num_accepted(one.drafts, new[begin:end], finite)
            kept.append(range(begin, begin + 1 + accepted))
            begin = end
        self._report(tokens, sampled, kept, _SampledLogits(logits, rows, new))

    def _fail_broken(
        self, tokens: StepTokens, plan: StepPlan, result: StepResult, is_finite: NDArray[np.bool_]
    ) -> None:
        """Fail sequences with a row of NaN or infinity, unless it is a draft's; such drafts are
        noted. ``is_finite``: [num_rows], for the rows of ``result.hidden``."""
        for planned, first in zip(plan.rows, result.first_row, strict=True):
            last = first + planned.count - len(planned.drafts)
            if not is_finite[first:last].all():
                tokens.complete.pop(planned.sequence, None)
                tokens.failed[planned.sequence] = NOT_FINITE
            if planned.drafts and not is_finite[first : first + planned.count].all():
                tokens.broken.append(planned)

    def _rows_to_sample(
        self, complete: Mapping[SequenceState, int], plan: StepPlan
    ) -> list[_SampledRows]:
        """Return the rows from which tokens are sampled, in ascending order."""
        rows = [
            _SampledRows(planned.sequence, complete[planned.sequence], planned.drafts)
            for planned in plan.rows
            if planned.sequence in complete and planned.sequence.params.max_tokens
        ]
        return sorted(rows, key=attrgetter("first"))

    def _report(
        self,
        tokens: StepTokens,
        sampled: Sequence[_SampledRows],
        kept: Sequence[range],
        drawn: _SampledLogits,
    ) -> None:
        """Record the accepted tokens of each sequence, with logprobs if they are requested.

        ``kept``: for each entry of ``sampled``, the indices into ``drawn`` of its accepted tokens.
        """
        row_indices = [row_index for own in kept for row_index in own]
        rows = [drawn.rows[row_index] for row_index in row_indices]
        ids = [drawn.tokens[row_index] for row_index in row_indices]
        logits = None if drawn.logits is None else select_rows(drawn.logits, row_indices)
        results = iter(sampled_tokens(logits, rows, ids, self._score))
        for one, own in zip(sampled, kept, strict=True):
            tokens_of = [next(results) for _ in own]
            sequence, failure = one.sequence, tokens_of[0].failure
            if sequence in tokens.failed:
                continue
            if failure is None:
                tokens.drawn[sequence] = tokens_of
            else:
                self._fail(tokens, sequence, self._failure(sequence, failure))
        beams = {
            one.sequence: own[0]
            for one, own in zip(sampled, kept, strict=True)
            if one.sequence.params.beams is not None and one.sequence in tokens.drawn
        }
        if beams and drawn.logits is not None:
            self._find_candidates(tokens, beams, drawn.logits)

    def _find_candidates(
        self, tokens: StepTokens, beams: Mapping[SequenceState, int], logits: Tensor
    ) -> None:
        """Find the candidate next tokens of beams, request by request.

        ``beams``: row in ``logits`` of each beam.
        """
        by_request: dict[str, list[SequenceState]] = {}
        for sequence in beams:
            by_request.setdefault(sequence.request.request_id, []).append(sequence)
        for sequences in by_request.values():
            rows = [beams[sequence] for sequence in sequences]
            request, params = sequences[0].request, sequences[0].params
            candidate_params = CandidateParams(
                width=request.n,
                ending=ending_tokens(request, self._eos),
                may_end=len(sequences[0].output) >= params.min_tokens,
                num_top=params.logprobs,
            )
            candidates = self._candidates(select_rows(logits, rows), candidate_params)
            tokens.candidates.update(zip(sequences, candidates, strict=True))

    def _logits_of(self, rows: Sequence[int], result: StepResult) -> Tensor:
        """Return the logits [len(rows), V] of the given rows, which must be ascending."""
        if result.logits is not None:
            return select_rows(result.logits, rows)
        return self._logits(select_rows(result.hidden, rows))

    def _classify(self, tokens: StepTokens, hidden: Tensor) -> None:
        """Compute the class logits of complete prompts, if the model is a classifier."""
        if not self._is_classifier or not tokens.complete:
            return
        ends = list(tokens.complete.values())
        rows: Sequence[list[float]] = self._logits(select_rows(hidden, ends)).float().tolist()
        for sequence, row in zip(tuple(tokens.complete), rows, strict=True):
            if not all(map(math.isfinite, row)):
                self._fail(tokens, sequence, NOT_FINITE)
            elif sequence.request.inspection is None:  # an inspection ignores padding
                tokens.classes[sequence] = tuple(row)

    def _failure(self, sequence: SequenceState, failure: SamplingFailure) -> Failure:
        """Return the error for the client of a sequence for which no token could be sampled."""
        if failure is not SamplingFailure.NONE_ALLOWED:
            return NOT_FINITE
        where = f"position {len(sequence.output)} of the output"
        requested, grammar = sequence.params.grammar, self._processors[sequence].grammar
        if requested is not None and grammar is not None and grammar.error is not None:
            message = f"{requested.field} cannot be followed at {where}: {grammar.error}"
            return Failure(message, "invalid_value", requested.field)
        return Failure(f"no token is allowed at {where}", "invalid_value")

    def _fail(self, tokens: StepTokens, sequence: SequenceState, failure: Failure) -> None:
        del tokens.complete[sequence]
        tokens.failed[sequence] = failure
