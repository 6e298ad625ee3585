"""Runs the inspections of an engine: checks them, and collects the results of steps in buffers.

A step only reads its results; they are added to the buffers when the step commits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cluster.core.errors import QueueFullError, RequestError
from workers.inspection.buffers import InspectionBuffers, StepRows, shape_of
from workers.inspection.recorder import Capture
from workers.model.config import BankSpec, ModelConfig
from workers.requests.inspection import (
    IGNORED_LABEL,
    InspectionParams,
    NamedArray,
    check_inspection,
    num_bytes,
)
from workers.requests.request import Request, TokenLogprob
from workers.requests.sequence import SequenceState
from workers.sampling.sampler import all_finite

_ROWS = 64
"""Maximum number of rows whose logits are computed at a time."""

Score = Callable[[Tensor, Sequence[int], Sequence[int]], list[TokenLogprob]]
"""Function like ``sampler.logprob_entries``."""


class Inspector:
    """Checks inspections, limits their memory, and reads their results from steps.

    Args:
        config: the model's configuration.
        banks: the model's expert banks.
        logits: the model's head: [rows, H] -> [rows, V].
        score: computes log-probabilities of given tokens.
        max_held_bytes: maximum total result size of all inspections in the engine.
    """

    def __init__(
        self,
        config: ModelConfig,
        banks: Sequence[BankSpec],
        logits: Callable[[Tensor], Tensor],
        score: Score,
        max_held_bytes: int = 256 * 1024 * 1024,
    ) -> None:
        self._config = config
        self._banks = tuple(banks)
        self._shape = shape_of(config, banks)
        self._logits = logits
        self._score = score
        self._max_held_bytes = max_held_bytes
        self._buffers: dict[SequenceState, InspectionBuffers] = {}

    def check(self, request: Request) -> None:
        """Check a request's inspection, if it has one.

        Raises:
            RequestError: the inspection can never be served.
            QueueFullError: the buffers have no free memory while other inspections run.
        """
        inspection = request.inspection
        if inspection is None:
            return
        params = request.params
        is_plain = request.n == 1 and params.max_tokens == 0 and params.prompt_logprobs is None
        if not is_plain:
            raise RequestError("an inspection needs n 1, max_tokens 0 and no prompt_logprobs", "n")
        length = len(request.prompt)
        check_inspection(inspection, length, self._shape)
        held = sum(self._size(sequence.request) for sequence in self._buffers)
        limit = self._max_held_bytes
        if held and held + num_bytes(inspection, length, self._shape) > limit:
            raise QueueFullError(f"inspections hold {held} bytes, at most {limit} may be held")

    def start(self, sequence: SequenceState) -> None:
        """Create buffers for a checked request, if it has an inspection."""
        inspection, length = sequence.request.inspection, sequence.prompt_length
        if inspection is not None:
            self._buffers[sequence] = InspectionBuffers(
                inspection, length, self._config, self._banks
            )

    def end(self, sequence: SequenceState) -> None:
        """Drop a sequence's buffers, if it has any."""
        self._buffers.pop(sequence, None)

    def add(self, sequence: SequenceState, rows_found: StepRows) -> None:
        """Add the results of a committed step."""
        self._buffers[sequence].add(rows_found)

    def arrays(self, sequence: SequenceState) -> tuple[NamedArray, ...]:
        """All results, once the last row was added; empty without an inspection."""
        buffers = self._buffers.get(sequence)
        return () if buffers is None else tuple(buffers.arrays())

    def read(
        self, request: Request, first: int, hidden: Tensor, captures: Sequence[Capture]
    ) -> StepRows | None:
        """Return a step's results, or None if a logit is NaN or infinity. Does not change buffers.

        ``hidden``: [count, H] final states of the positions from ``first`` on.
        """
        inspection = request.inspection
        assert inspection is not None, "the request has an inspection"
        rows = _wanted_rows(inspection, first, first + len(hidden))
        logits: dict[int, Tensor] = {}
        logprobs: dict[int, float] = {}
        for start in range(0, len(rows), _ROWS):
            positions = rows[start : start + _ROWS]
            row_logits = self._logits(hidden[torch.tensor(positions) - first])
            if not all_finite(row_logits):
                return None
            logits |= self._kept(inspection, positions, row_logits)
            logprobs |= self._scored(inspection, positions, row_logits)
        return StepRows(
            first=first,
            hidden=hidden,
            logits=logits,
            logprobs=logprobs,
            captures=sorted(captures, key=lambda capture: capture.first),
        )

    def _size(self, request: Request) -> int:
        assert request.inspection is not None
        return num_bytes(request.inspection, len(request.prompt), self._shape)

    def _kept(
        self, inspection: InspectionParams, positions: Sequence[int], row_logits: Tensor
    ) -> dict[int, Tensor]:
        requested = set(inspection.logits)
        return {
            position: row.to("cpu", torch.float32, copy=True)
            for position, row in zip(positions, row_logits, strict=True)
            if position in requested
        }

    def _scored(
        self, inspection: InspectionParams, positions: Sequence[int], row_logits: Tensor
    ) -> dict[int, float]:
        """Log-probabilities of the labels that follow ``positions``, by position of the label."""
        behind = {p: _label(inspection, p + 1) for p in positions}
        kept = [i for i, p in enumerate(positions) if behind[p] != IGNORED_LABEL]
        if not kept:
            return {}
        labels = [behind[positions[i]] for i in kept]
        entries = self._score(row_logits[kept], labels, [0] * len(kept))
        return {positions[i] + 1: e.logprob for i, e in zip(kept, entries, strict=True)}


def _label(inspection: InspectionParams, position: int) -> int:
    labels = inspection.labels
    return labels[position] if position < len(labels) else IGNORED_LABEL


def _wanted_rows(inspection: InspectionParams, first: int, last: int) -> list[int]:
    """Positions from ``first`` to ``last - 1`` whose logits are needed, ascending."""
    positions = {position for position in inspection.logits if first <= position < last}
    positions.update(p for p in range(first, last) if _label(inspection, p + 1) != IGNORED_LABEL)
    return sorted(positions)
