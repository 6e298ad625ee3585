"""Outputs of the model for the rows of a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from workers.engine.expert_load import RoutedDecodes, RoutedRows
from workers.inspection.recorder import Capture
from workers.model.host_copies import to_host_later
from workers.requests.sequence import SequenceState


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """The model's outputs for the rows of a plan."""

    hidden: Tensor
    """Hidden states after the final norm, [num_rows, hidden_size]."""
    first_row: tuple[int, ...]
    """Index of the row in ``hidden`` at which each entry of ``plan.rows`` begins."""
    finite: Tensor
    """Whether each row of ``hidden`` is free of NaN and infinity, [num_rows]: bool, or 0 and 1."""
    logits: Tensor | None
    """Logits of all rows of ``hidden``, [num_rows, V]; None if the model's head has not run."""
    drawn: Tensor | None
    """The token sampled from each row's unprocessed logits, -1 for a row whose logits have NaN or
    infinity, and ``finite``: [num_rows, 2] int64. None if not computed."""
    finish: Callable[[], None]
    """Function that waits for the step's messages. Call it before the host reads a tensor of this
    result, or a tensor computed from one. Raises ``TransportError``."""
    routed: Sequence[Sequence[RoutedRows]]
    """Experts that the routers chose, indexed [bank][micro-batch]."""
    captures: Mapping[SequenceState, Sequence[Capture]]
    """Internal tensors of the model, for sequences of requests that ask for them."""

    def to_host_later(self) -> Callable[[], StepResult]:
        """Start to copy ``drawn`` to the host, before the next step overwrites the tensors.

        Returns a function that waits for the end of this step on the device, and returns the result
        with ``drawn`` and ``finite`` in host memory. If the step has messages, call it after the
        function of ``CapturableDispatcher.finish_later``.
        """
        assert self.drawn is not None, "the step is captured"
        drawn, end = to_host_later(self.drawn), torch.cuda.Event()  # type: ignore[no-untyped-call]
        end.record()

        def read() -> StepResult:
            end.synchronize()
            return replace(self, drawn=drawn, finite=drawn[:, 1], finish=_do_nothing)

        return read

    def select(self, entries: Sequence[int]) -> StepResult:
        """Return the result for some entries of the plan of a captured step."""
        assert isinstance(self.routed, RoutedDecodes), "the step is captured"
        first_row = tuple(self.first_row[entry] for entry in entries)
        return replace(self, first_row=first_row, routed=replace(self.routed, kept=first_row))


def _do_nothing() -> None:
    """In place of ``StepResult.finish`` of a step that has been waited for."""


@dataclass(frozen=True, slots=True)
class PredictorOutput:
    """Outputs of the model's prediction layer (for draft tokens) for the rows of a plan."""

    hidden: Tensor
    """Inputs of the model's head, [num_rows, hidden_size], in the row order of ``StepResult``."""
    routed: Sequence[Sequence[RoutedRows]]
    """Experts that all routers chose, also in the prediction layer: [bank][micro-batch]."""
