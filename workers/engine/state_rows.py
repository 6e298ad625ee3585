"""Recurrent states of a micro-batch: planned rows to the runs that layers with a state read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

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
    by_sequence = [*_runs(planned)]
    runs = tuple(run for own in by_sequence for run in own)
    places = torch.tensor([(run.first, run.last, run.read, run.write) for run in runs])
    chains = torch.tensor([0, *accumulate(map(len, by_sequence))])
    slots = places[:num_decodes, 2:].T.contiguous()
    return StateRows(runs, places, chains, num_decodes, to_device(slots.numpy(), device))


def _runs(planned: Sequence[PlannedRows]) -> Iterator[list[StateRun]]:
    """Those of each sequence."""
    begin = 0
    for rows in planned:
        assert rows.states is not None, "all sequences have states, or none"
        offset = begin - rows.first
        found = rows.states.runs(rows.first, rows.first + rows.count)
        yield [StateRun(a + offset, b + offset, read, write) for a, b, read, write in found]
        begin += rows.count
