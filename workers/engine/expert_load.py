"""Expert load of an attention rank: the experts that its routers chose in committed steps.

A step only queues its tensors. Later, usually on the thread that reports the counts, one operation
for each bank counts many steps, so a step spends almost no time on counting. On a GPU this work has
a stream of its own, which never waits for a step that may still run: the thread that reports also
follows the controller. Padding rows and failed steps are not counted.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from typing import overload

import numpy as np
import torch
from msgspec.structs import replace
from numpy.typing import NDArray
from torch import Tensor

from cluster.core.load_report import BankCounts, LoadReport, sum_by_copy
from workers.dispatch.copies import ChosenCopies
from workers.model.config import BankSpec
from workers.model.host_copies import to_device, to_host
from workers.model.side_stream import SideStream

_MAX_STEPS = 256
"""Number of queued steps at which the data thread itself counts their rows."""
_MAX_ROWS = 4096
"""Number of queued rows at which the data thread itself counts them: 12 MB of tensors with 61
layers of top-6."""


@dataclass(frozen=True, slots=True)
class RoutedRows:
    """Experts chosen by the rows of one micro-batch in one bank. Decode rows are first."""

    topk_ids: Tensor
    """Logical experts that the router chose for each row, [rows, top_k] int64; never changed."""
    copies: ChosenCopies | None
    """The copy of each chosen expert that serves a prompt row; None: all prompt rows count for the
    first copy."""
    num_decodes: int


@dataclass(frozen=True, slots=True)
class RoutedDecodes(Sequence[Sequence[RoutedRows]]):
    """Experts chosen by the decode rows of a captured step, indexed [bank][0].

    The tensor is split by bank only when it is counted, so that a step takes no longer with more
    banks.
    """

    topk_ids: Tensor
    """Chosen experts of all banks, [sum of top_k, rows] int64: transposed, one bank after another.
    """
    ends: Sequence[int]
    """For each bank, the index in ``topk_ids`` after its last row."""
    kept: Sequence[int] | None = None
    """The rows that count; None: all rows. See ``selected``."""

    def selected(self) -> RoutedDecodes:
        """Return the rows that count."""
        if self.kept is None:
            return self
        rows = to_device(self.kept, self.topk_ids.device)
        return RoutedDecodes(self.topk_ids.index_select(1, rows), self.ends)

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> Sequence[RoutedRows]: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Sequence[RoutedRows]]: ...

    def __getitem__(
        self, index: int | slice
    ) -> Sequence[RoutedRows] | Sequence[Sequence[RoutedRows]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        first = self.ends[index - 1] if index else 0
        own = self.topk_ids[first : self.ends[index]].t()
        return (RoutedRows(own, None, len(own)),)


@dataclass(frozen=True, slots=True)
class _PendingStep:
    """A committed step whose rows are not counted yet."""

    epoch: int
    num_rows: int
    routed: Sequence[Sequence[RoutedRows]]


@dataclass(frozen=True, slots=True)
class _Counts:
    """Counts of rows by expert, for steps of one placement epoch; the tensors are on the device."""

    epoch: int
    num_rows: int
    decode: Sequence[Tensor]
    """For each bank, the number of decode rows that chose each expert: [experts] int64."""
    prefill: Sequence[Tensor]
    """For each bank, the number of prompt rows that chose each expert, by the copy that served
    them: [experts, copies] int64."""


class LoadCounter:
    """Counts the rows of committed steps by chosen expert and expert copy.

    ``add`` is for the data thread; any thread may call ``flush`` and ``report``.
    """

    def __init__(self, banks: Sequence[BankSpec], side: SideStream) -> None:
        self._banks = tuple(banks)
        self._side = side
        self._pending: deque[_PendingStep] = deque()
        self._num_steps = self._num_rows = 0
        self._lock = threading.Lock()
        self._counts = [BankCounts.zeros(b.num_experts) for b in banks]
        self._epoch = 0
        self._rows = 0

    def add(
        self,
        epoch: int,
        num_rows: int,
        routed: Sequence[Sequence[RoutedRows]],
        *,
        is_late: bool = False,
    ) -> None:
        """Queue a committed step. ``routed``: its chosen experts, indexed [bank][micro-batch].

        ``is_late``: the host has waited for the step, and the device may run the next one, for
        which the counts must not wait.
        """
        if not is_late:
            self._side.note_steps()
        self._pending.append(_PendingStep(epoch, num_rows, routed))
        self._num_steps += 1
        self._num_rows += num_rows
        if self._num_steps >= _MAX_STEPS or self._num_rows >= _MAX_ROWS:
            self._num_steps = self._num_rows = 0
            self.flush()

    def flush(self) -> None:
        """Count all queued steps, and copy the counts to the host."""
        with self._lock, self._side.work():
            entries = self._take_pending()
            self._side.follow_noted()
            folded = self._sum_by_epoch(entries)
            tensors = [own for counts in folded for own in (*counts.decode, *counts.prefill)]
            arrays = iter(to_host(tensors) if tensors else ())
            for counts in folded:
                self._add_to_totals(counts, arrays)

    def report(self) -> LoadReport:
        """Return the counts of all steps since the start, including queued ones."""
        self.flush()
        with self._lock:
            banks = zip(self._banks, self._counts, strict=True)
            return LoadReport(
                epoch=self._epoch,
                rows=self._rows,
                banks={(spec.bank, spec.layer): counts for spec, counts in banks},
            )

    def _take_pending(self) -> list[_PendingStep]:
        """Remove and return all queued entries."""
        entries = []
        with suppress(IndexError):
            while True:
                entries.append(self._pending.popleft())
        return entries

    def _sum_by_epoch(self, entries: Sequence[_PendingStep]) -> list[_Counts]:
        """Sum consecutive entries of equal placement epoch, without a device synchronization."""
        return [self._sum(tuple(group)) for _, group in groupby(entries, lambda each: each.epoch)]

    def _sum(self, steps: Sequence[_PendingStep]) -> _Counts:
        """Count the rows of steps of one placement epoch."""
        sizes = [spec.num_experts for spec in self._banks]
        all_routed = [
            step.routed.selected() if isinstance(step.routed, RoutedDecodes) else step.routed
            for step in steps
        ]
        routed = [
            [part for of_step in all_routed for part in of_step[bank]]
            for bank in range(len(self._banks))
        ]
        return _Counts(
            steps[0].epoch,
            sum(step.num_rows for step in steps),
            [_tally_decodes(*own) for own in zip(routed, sizes, strict=True)],
            [_tally_copies(*own) for own in zip(routed, sizes, strict=True)],
        )

    def _add_to_totals(self, counts: _Counts, arrays: Iterator[NDArray[np.int64]]) -> None:
        """Add ``counts`` to the totals; ``arrays`` yields the tensors of ``counts`` on the host."""
        if counts.epoch > self._epoch:
            self._epoch = counts.epoch
            self._counts = [
                replace(BankCounts.zeros(old.num_experts), prefill=old.prefill, decode=old.decode)
                for old in self._counts
            ]
        is_late = counts.epoch < self._epoch  # counted for an earlier placement
        self._rows += counts.num_rows
        decodes = [next(arrays) for _ in counts.decode]
        prefills = [next(arrays) for _ in counts.prefill]
        for bank, (decode, prefill) in enumerate(zip(decodes, prefills, strict=True)):
            old = self._counts[bank]
            # New arrays, because reports keep the old ones.
            new = replace(old, prefill=old.prefill + prefill.sum(1), decode=old.decode + decode)
            if not is_late:
                new = replace(
                    new,
                    epoch_prefill=sum_by_copy(old.epoch_prefill, prefill),
                    epoch_decode=old.epoch_decode + decode,
                )
            self._counts[bank] = new


def _tally_decodes(routed: Sequence[RoutedRows], num_experts: int) -> Tensor:
    """Return the number of decode rows that chose each expert, [num_experts] int64."""
    ids = [r.topk_ids[: r.num_decodes] for r in routed if r.num_decodes]
    return _tally(ids, num_experts, routed)


def _tally_copies(routed: Sequence[RoutedRows], num_experts: int) -> Tensor:
    """Return the number of prompt rows that each copy of each expert served, [num_experts, copies]
    int64."""
    prompts = [r for r in routed if r.num_decodes < len(r.topk_ids)]
    num_copies = max((r.copies.num_copies for r in prompts if r.copies is not None), default=1)
    keys = [_prompt_keys(r, num_copies) for r in prompts]
    return _tally(keys, num_experts * num_copies, routed).view(num_experts, num_copies)


def _prompt_keys(routed: RoutedRows, num_copies: int) -> Tensor:
    """Return ``expert * num_copies + index of its copy`` for each expert of each prompt row."""
    experts = routed.topk_ids[routed.num_decodes :] * num_copies
    if routed.copies is None:
        return experts
    return experts + routed.copies.places[routed.num_decodes :]


def _tally(parts: Sequence[Tensor], size: int, routed: Sequence[RoutedRows]) -> Tensor:
    """Return how often each index 0 .. size - 1 is in ``parts``, [size] int64.

    The result is on the device of ``routed``.
    """
    if not parts:
        device = routed[0].topk_ids.device if routed else None
        return torch.zeros(size, dtype=torch.int64, device=device)
    joined = torch.cat([part.flatten() for part in parts])
    if joined.is_cpu:
        return torch.bincount(joined, minlength=size)
    # ``bincount`` would synchronize with the device.
    return joined.new_zeros(size).index_add_(0, joined, torch.ones_like(joined))
