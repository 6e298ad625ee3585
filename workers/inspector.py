"""Inspections of an engine: what may be taken in, and what a step finds for each.

Nothing here changes before the commit: a step's pieces are made first, and added to the findings of
their requests when the step counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cluster.errors import QueueFullError, RequestError
from workers.capture import Capture
from workers.families.base import BankSpec, ModelConfig
from workers.findings import Findings, Piece, shape_of
from workers.inspection import IGNORED_LABEL, Inspection, check_inspection, num_bytes
from workers.request import Request, TokenLogprob
from workers.sampling import all_finite

MAX_HELD_BYTES = 256 * 1024 * 1024
"""What the inspections that an engine holds may bring home together."""
_ROWS = 64
"""Rows whose logits are made at a time."""

Score = Callable[[Tensor, Sequence[int], Sequence[int]], list[TokenLogprob]]
"""Like ``sampling.logprob_entries``."""


class Inspector:
    """Checks inspections, bounds what they hold, and reads steps for them.

    Args:
        config: the model's numbers.
        banks: its expert banks.
        logits: head of the model: [rows, H] -> [rows, V].
        score: makes log-probabilities of given tokens.
    """

    def __init__(
        self,
        config: ModelConfig,
        banks: Sequence[BankSpec],
        logits: Callable[[Tensor], Tensor],
        score: Score,
    ) -> None:
        self._config = config
        self._banks = tuple(banks)
        self._shape = shape_of(config, banks)
        self._logits = logits
        self._score = score
        self.held_bytes = 0
        """What the inspections held now may bring home."""

    def check(self, request: Request) -> None:
        """Refuse what cannot be had.

        Raises:
            RequestError: it can never be had.
            QueueFullError: too much is held already.
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
        held = self.held_bytes
        if held and held + num_bytes(inspection, length, self._shape) > MAX_HELD_BYTES:
            raise QueueFullError(
                f"inspections hold {held} bytes, at most {MAX_HELD_BYTES} may be held"
            )

    def start(self, request: Request) -> Findings | None:
        """Buffers for a request that was checked; empty until a step is added."""
        if request.inspection is None:
            return None
        self.held_bytes += self._size(request)
        return Findings(request.inspection, len(request.prompt), self._config, self._banks)

    def end(self, request: Request) -> None:
        """A request that was started is no longer held."""
        if request.inspection is not None:
            self.held_bytes -= self._size(request)

    def read(
        self, request: Request, first: int, hidden: Tensor, captures: Sequence[Capture]
    ) -> Piece | None:
        """What a step found: ``hidden`` [count, H] are the final states from position ``first`` on.

        None when a logit is NaN or infinity. Changes nothing.
        """
        inspection = request.inspection
        assert inspection is not None, "asked for"
        rows = _wanted_rows(inspection, first, first + len(hidden))
        logits: dict[int, Tensor] = {}
        logprobs: dict[int, float] = {}
        for start in range(0, len(rows), _ROWS):
            places = rows[start : start + _ROWS]
            found = self._logits(hidden[torch.tensor(places) - first])
            if not all_finite(found):
                return None
            logits |= self._kept(inspection, places, found)
            logprobs |= self._scored(inspection, places, found)
        return Piece(
            first=first,
            count=len(hidden),
            hidden=hidden,
            logits=logits,
            logprobs=logprobs,
            captures=sorted(captures, key=lambda capture: capture.first),
        )

    def _size(self, request: Request) -> int:
        assert request.inspection is not None
        return num_bytes(request.inspection, len(request.prompt), self._shape)

    def _kept(
        self, inspection: Inspection, places: Sequence[int], found: Tensor
    ) -> dict[int, Tensor]:
        wanted = set(inspection.logits)
        return {
            place: row.to("cpu", torch.float32, copy=True)
            for place, row in zip(places, found, strict=True)
            if place in wanted
        }

    def _scored(
        self, inspection: Inspection, places: Sequence[int], found: Tensor
    ) -> dict[int, float]:
        """Log-probability of the label behind each place, by the label's position."""
        behind = {p: _label(inspection, p + 1) for p in places}
        kept = [i for i, p in enumerate(places) if behind[p] != IGNORED_LABEL]
        if not kept:
            return {}
        labels = [behind[places[i]] for i in kept]
        entries = self._score(found[kept], labels, [0] * len(kept))
        return {places[i] + 1: e.logprob for i, e in zip(kept, entries, strict=True)}


def _label(inspection: Inspection, position: int) -> int:
    labels = inspection.labels
    return labels[position] if position < len(labels) else IGNORED_LABEL


def _wanted_rows(inspection: Inspection, first: int, last: int) -> list[int]:
    """Positions from ``first`` to ``last`` - 1 whose logits are needed, ascending."""
    wanted = {place for place in inspection.logits if first <= place < last}
    wanted.update(p for p in range(first, last) if _label(inspection, p + 1) != IGNORED_LABEL)
    return sorted(wanted)
