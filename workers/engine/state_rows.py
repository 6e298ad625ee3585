"""Recurrent states of a micro-batch: planned rows to the runs that layers with a state read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from workers.engine.step_plan import PlannedRows
from workers.model.attention import StateRows, StateRun
from workers.model.host_copies import to_device


def state_rows(
    planned: Sequence[PlannedRows], num_decodes: int, device: torch.device
) -> StateRows | None:
    """Rows of a micro-batch, the decodes first; None: the model has no recurrent states."""
    if not planned or planned[0].states is None:
        return None
    runs = tuple(_runs(planned))
    decodes = runs[:num_decodes]
    slots = np.array([[run.read for run in decodes], [run.write for run in decodes]], np.int64)
    return StateRows(runs, num_decodes, to_device(slots, device))


def _runs(planned: Sequence[PlannedRows]) -> Iterator[StateRun]:
    row = 0
    for rows in planned:
        assert rows.states is not None, "all sequences have states, or none"
        for first, last, read, write in rows.states.runs(rows.first, rows.first + rows.count):
            yield StateRun(row, row + last - first, read, write)
            row += last - first
