"""Expert load of an attention rank: what its routers chose in committed steps.

A step only leaves its tensors here. They are counted in bulk, many steps in one operation for each
bank, mostly by the thread that reports them, so the step itself spends almost no time on them.
Padding is never counted, as routers do not see it, nor is a step that failed.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from cluster.core.load_report import BankCounts, Counts, LoadReport, sum_by_copy
from workers.model.config import BankSpec
from workers.model.side_stream import SideStream

_MAX_STEPS = 256
"""Pending steps from which on the data thread counts."""
_MAX_ROWS = 4096
"""Pending rows from which on the data thread counts: 12 MB with 61 layers of top-6."""


@dataclass(frozen=True, slots=True)
class Routed:
    """What the rows of one micro-batch chose in one bank. Decode rows come first."""

    topk_ids: Tensor
    """[rows, top_k] int64, never changed later."""
    copies: Tensor | None
    """[rows, top_k] int64: which copy of its expert serves a prompt row; None: the first."""
    num_decodes: int


@dataclass(frozen=True, slots=True)
class _Step:
    """A committed step that is not counted yet."""

    epoch: int
    num_rows: int
    routed: Sequence[Sequence[Routed]]


class LoadCounter:
    """Tokens by expert and copy. ``add`` belongs to the data thread; any thread may read."""

    def __init__(self, banks: Sequence[BankSpec], side: SideStream) -> None:
        self._banks = tuple(banks)
        self._side = side
        self._pending: deque[_Step] = deque()
        self._pending_rows = 0
        self._lock = threading.Lock()
        self._counts = [BankCounts.zeros(b.num_experts) for b in banks]
        self._epoch = 0
        self._rows = 0

    def add(self, epoch: int, num_rows: int, routed: Sequence[Sequence[Routed]]) -> None:
        """A step of an epoch is committed; ``routed`` is [bank][micro-batch]."""
        self._side.note_steps()
        self._pending.append(_Step(epoch, num_rows, routed))
        self._pending_rows += num_rows
        if len(self._pending) >= _MAX_STEPS or self._pending_rows >= _MAX_ROWS:
            self.flush()

    def flush(self) -> None:
        """Count what was added so far."""
        with self._lock, self._side.work():
            self._pending_rows = 0
            steps = [self._pending.popleft() for _ in range(len(self._pending))]
            self._side.follow_noted()
            for epoch, group in groupby(steps, key=lambda step: step.epoch):
                self._count(epoch, tuple(group))

    def report(self) -> LoadReport:
        """All counts at this moment."""
        self.flush()
        with self._lock:
            banks = zip(self._banks, self._counts, strict=True)
            return LoadReport(
                epoch=self._epoch,
                rows=self._rows,
                banks={(spec.bank, spec.layer): counts for spec, counts in banks},
            )

    def _count(self, epoch: int, steps: Sequence[_Step]) -> None:
        if epoch > self._epoch:
            self._epoch = epoch
            self._counts = [
                BankCounts(
                    prefill=old.prefill,
                    decode=old.decode,
                    epoch_prefill=np.zeros((old.num_experts, 1), dtype=np.int64),
                    epoch_decode=np.zeros(old.num_experts, dtype=np.int64),
                )
                for old in self._counts
            ]
        self._rows += sum(step.num_rows for step in steps)
        for bank, old in enumerate(self._counts):
            routed = [part for step in steps for part in step.routed[bank]]
            decodes = (r.topk_ids[: r.num_decodes] for r in routed if r.num_decodes)
            decode = _tally(decodes, old.num_experts)
            prefill = _tally_copies(routed, old.num_experts)
            # New arrays: reports keep the old ones.
            self._counts[bank] = BankCounts(
                prefill=old.prefill + prefill.sum(1),
                decode=old.decode + decode,
                epoch_prefill=sum_by_copy(old.epoch_prefill, prefill),
                epoch_decode=old.epoch_decode + decode,
            )


def _tally_copies(routed: Sequence[Routed], num_experts: int) -> Counts:
    """[num_experts, copies] prompt rows."""
    prompts = [r for r in routed if r.num_decodes < len(r.topk_ids)]
    if not prompts:
        return np.zeros((num_experts, 1), dtype=np.int64)
    highest = (int(r.copies[r.num_decodes :].max()) for r in prompts if r.copies is not None)
    most = 1 + max(highest, default=0)
    keys = (_prompt_keys(r, most) for r in prompts)
    return _tally(keys, num_experts * most).reshape(num_experts, most)


def _prompt_keys(routed: Routed, num_copies: int) -> Tensor:
    """Expert times ``num_copies`` plus copy, of the prompt rows' pairs."""
    experts = routed.topk_ids[routed.num_decodes :] * num_copies
    return experts if routed.copies is None else experts + routed.copies[routed.num_decodes :]


def _tally(parts: Iterable[Tensor], size: int) -> Counts:
    """How often each number below ``size`` is in the tensors."""
    found = list(parts)
    if not found:
        return np.zeros(size, dtype=np.int64)
    joined = torch.cat(found).flatten().cpu().numpy()  # device-to-host sync
    return np.bincount(joined, minlength=size).astype(np.int64)
