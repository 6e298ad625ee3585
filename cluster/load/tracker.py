"""Expert load of the whole cluster over time: totals, windows, exponential averages. Pure.

Attention workers report their counts since their start (``cluster.core.load_report``). The tracker
sums these counts; the difference between the sums at two times is a window. Each ``half_life_s`` of
time with load halves the weight of a window in the average; idle time does not change the average.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from cluster.config.expert_load import LoadSection
from cluster.core.load_profile import BankLoad, LoadProfile
from cluster.core.load_report import BankKey, Counts, LoadReport, sum_by_copy

Source = Literal["total", "window", "average"]
"""Period over which load is counted: since the start, the newest window with load, or the
exponential average of windows."""
Phase = Literal["prefill", "decode"]
Floats = npt.NDArray[np.float64]
TOP_EXPERTS = 8
"""Number of experts of each bank that have a metric of their own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadSums:
    """Tokens by expert, summed over attention workers at one time, or the difference between two
    times."""

    rows: float
    """Number of rows (token positions) of committed steps."""
    prefill: Mapping[BankKey, Floats]
    """Number of prompt rows that chose each expert, [num_experts] by bank."""
    decode: Mapping[BankKey, Floats]
    """Number of decode rows that chose each expert, [num_experts] by bank."""

    def counts(self, key: BankKey) -> Floats:
        """Return the number of tokens that chose each expert of a bank, in prefill and decode
        together: [num_experts]."""
        return self.prefill[key] + self.decode[key]

    def combined(self, factor: float, other: LoadSums, other_factor: float) -> LoadSums:
        """Return ``factor`` times these sums plus ``other_factor`` times ``other``. A bank that
        only one of them has counts as zero in the other."""
        sides = ((self, factor), (other, other_factor))
        return LoadSums(
            rows=factor * self.rows + other_factor * other.rows,
            prefill=_sums((key, w * c) for side, w in sides for key, c in side.prefill.items()),
            decode=_sums((key, w * c) for side, w in sides for key, c in side.decode.items()),
        )


_NOTHING = LoadSums(rows=0.0, prefill={}, decode={})


@dataclass(frozen=True, kw_only=True, slots=True)
class CopyLoad:
    """Tokens that each copy of a bank's experts computed in one placement epoch."""

    prefill: Counts
    """Number of prompt rows that each copy computed, [num_experts, copies]; copies are in the order
    of ``BankPlacement.logical_to_physical``."""
    decode: Counts
    """Number of decode rows of each expert, all computed by its decode device, [num_experts]."""

    def plus(self, prefill: Counts, decode: Counts) -> CopyLoad:
        return CopyLoad(prefill=sum_by_copy(self.prefill, prefill), decode=self.decode + decode)


@dataclass(frozen=True, slots=True)
class LoadWindow:
    """Expert load in a span of time."""

    began_at: float
    """Start of the window in monotonic seconds."""
    sums: LoadSums
    epoch: int
    """Placement epoch at the end of the window."""
    copies: Mapping[BankKey, CopyLoad]
    """Load of each copy of the experts in the part of the window that ran in ``epoch``."""


class LoadTracker:
    """Collects the expert load that attention workers report. Owned by the controller; ``now`` is
    in monotonic seconds."""

    def __init__(self, section: LoadSection, now: float) -> None:
        self._section = section
        self._reports: dict[str, LoadReport] = {}
        self._totals: LoadSums | None = None
        self._copies: tuple[int, dict[BankKey, CopyLoad]] | None = None
        """Results of ``totals`` and, with its epoch, of ``copies``; None after a new report."""
        self._left = _NOTHING
        """Load that workers which have left reported, without those in ``_reports``."""
        self._older: set[str] = set()
        """Workers whose first report is still to come and counts load from before ``now``."""
        self._base = LoadWindow(now, _NOTHING, 0, {})
        """Load up to the start of the current window; ``began_at`` is the start."""
        self._average = _NOTHING
        self.watched: dict[BankKey, tuple[int, ...]] = {}
        """The busiest experts of each bank, which have metrics of their own; chosen again at each
        placement epoch, and constant between epochs."""
        self._watched_epoch: int | None = None
        self._own: dict[BankKey, Floats] = {}
        """Tokens of each expert that were counted while it was among the watched (busiest) ones, up
        to the latest choice of the watched experts, [num_experts] by bank."""
        self._chosen_at: dict[BankKey, Floats] = {}
        """All tokens of each expert at the latest choice of the watched (busiest) experts,
        [num_experts] by bank."""
        self.num_windows = 0
        """Number of windows with load that have ended so far."""
        self.windows: deque[LoadWindow] = deque(maxlen=section.num_windows)
        """The newest windows that had load, oldest first."""

    def resume(self, workers: Iterable[str]) -> None:
        """Record that an earlier controller has counted load of ``workers``, in its own windows."""
        self._older.update(workers)

    def take(self, worker: str, report: LoadReport | None) -> None:
        """Record the newest counts of a worker. A report of None, or one older than the recorded
        report, is ignored."""
        known = self._reports.get(worker)
        if report is not None and (known is None or report.rows >= known.rows):
            self._reports[worker] = report
            self._totals = self._copies = None
            if worker in self._older:
                self._older.remove(worker)
                sums = self._base.sums.combined(1.0, _sum_of([report]), 1.0)
                self._base = replace(self._base, sums=sums)

    def forget(self, alive: Collection[str]) -> None:
        """Keep only the sum of the load of workers that are not in ``alive``, as these have left.

        Reports of the newest placement epoch are still needed by worker, for ``copies``.
        """
        epoch = self.epoch
        gone = [n for n, r in self._reports.items() if n not in alive and r.epoch < epoch]
        if gone:
            load = _sum_of([self._reports.pop(name) for name in gone])
            self._left = self._left.combined(1.0, load, 1.0)
            self._totals = None

    def tick(self, now: float) -> LoadWindow | None:
        """End the current window if its time is over; return the ended window if it had load, else
        None."""
        base, epoch = self._base, self.epoch
        if now - base.began_at < self._section.window_s:
            return None
        totals, copies = self.totals(), self.copies(epoch)
        self._base = LoadWindow(now, totals, epoch, copies)
        sums = totals.combined(1.0, base.sums, -1.0)
        if sums.rows <= 0:
            return None
        known = base.copies if epoch == base.epoch else {}
        since = {
            key: load.plus(-known[key].prefill, -known[key].decode) if key in known else load
            for key, load in copies.items()
        }
        keep = 0.5 ** (self._section.window_s / self._section.half_life_s)
        self._average = self._average.combined(keep, sums, 1.0)
        window = LoadWindow(base.began_at, sums, epoch, since)
        self.windows.append(window)
        self.num_windows += 1
        self._watch(totals, epoch)
        return window

    @property
    def epoch(self) -> int:
        """Newest placement epoch that any worker has counted; 0 before the first step."""
        return max((r.epoch for r in self._reports.values()), default=0)

    def totals(self) -> LoadSums:
        """Return the load since the cluster's start, including the load that lost workers
        reported."""
        if self._totals is None:
            self._totals = self._left.combined(1.0, _sum_of(self._reports.values()), 1.0)
        return self._totals

    def copies(self, epoch: int) -> dict[BankKey, CopyLoad]:
        """Return the load of each copy of the experts in a placement epoch, by bank; empty unless
        it is the newest epoch."""
        if self._copies is not None and self._copies[0] == epoch:
            return self._copies[1]
        found: dict[BankKey, CopyLoad] = {}
        for report in self._reports.values() if epoch == self.epoch else ():
            for key, counts in report.banks.items() if report.epoch == epoch else ():
                prefill, decode = counts.epoch_prefill, counts.epoch_decode
                known = found.get(key)
                more = CopyLoad(prefill=prefill, decode=decode)
                found[key] = known.plus(prefill, decode) if known is not None else more
        self._copies = epoch, found
        return found

    def sums(self, source: Source) -> LoadSums:
        """Return the load in a period; without banks if there was none."""
        if source == "total":
            return self.totals()
        if source == "average":
            return self._average
        return self.windows[-1].sums if self.windows else _NOTHING

    def profile(self, source: Source, model: str, top_k: int) -> LoadProfile | None:
        """Return the load in a period as a load profile; None without load."""
        sums = self.sums(source)
        if sums.rows <= 0:
            return None
        banks = tuple(
            BankLoad(bank=key[0], layer=key[1], counts=tuple(sums.counts(key).tolist()))
            for key in sums.prefill
        )
        return LoadProfile(model=model, top_k=top_k, tokens=round(sums.rows), banks=banks)

    def watched_tokens(self, key: BankKey, counts: Floats) -> tuple[list[int], int]:
        """Return tokens of each watched (busiest) expert of a bank, and of the rest, as counters
        that never fall.

        Tokens of an expert that is not watched count as the rest. For example, if expert 5 has 70
        tokens when it is chosen, these remain in the rest, and its own counter begins at 0. The
        counter stops when another expert replaces expert 5, and continues if expert 5 is chosen
        again.

        ``counts``: [num_experts], all tokens of the bank so far.
        """
        own = self._own_tokens(key, counts)
        watched = own[list(self.watched.get(key, ()))]
        return [round(tokens) for tokens in watched.tolist()], round(float((counts - own).sum()))

    def _own_tokens(self, key: BankKey, counts: Floats) -> Floats:
        """Return the tokens of each expert that were counted while the expert was watched:
        [num_experts]."""
        if key not in self.watched:
            return np.zeros_like(counts)
        own, watched = self._own[key].copy(), list(self.watched[key])
        own[watched] += (counts - self._chosen_at[key])[watched]
        return own

    def _watch(self, totals: LoadSums, epoch: int) -> None:
        if epoch == self._watched_epoch:
            return
        self._watched_epoch = epoch
        for key in totals.prefill:
            counts = totals.counts(key)
            order = np.argsort(-counts, kind="stable")
            self._own[key], self._chosen_at[key] = self._own_tokens(key, counts), counts
            self.watched[key] = tuple(sorted(int(e) for e in order[:TOP_EXPERTS]))


def _sum_of(reports: Collection[LoadReport]) -> LoadSums:
    return LoadSums(
        rows=float(sum(r.rows for r in reports)),
        prefill=_sums((key, c.prefill) for r in reports for key, c in r.banks.items()),
        decode=_sums((key, c.decode) for r in reports for key, c in r.banks.items()),
    )


def _sums(parts: Iterable[tuple[BankKey, Counts | Floats]]) -> dict[BankKey, Floats]:
    total: dict[BankKey, Floats] = {}
    for key, counts in parts:
        total[key] = total[key] + counts if key in total else counts.astype(np.float64)
    return total
