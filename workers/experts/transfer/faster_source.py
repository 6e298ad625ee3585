"""Source that reads each expert from the faster of several sources: checkpoint or other workers.

    FasterSource ──▶ CheckpointSource        the files, mapped
                └──▶ HoldersSource ──▶ PeerSource   one for each worker that holds experts

Which source is faster is not known in advance: files in the page cache are faster than any network,
and a cold network disk is slower than most. So each source first loads ``NUM_TRIALS`` experts;
afterwards each expert is read from the source with the highest recent rate. A slower source is
measured again after ``_RETRY_AFTER`` times the time that it takes for an expert, as it may have
stalled only for a moment. A source that failed is tried last.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from cluster.core.errors import ExpertMeshError, ProtocolError
from cluster.core.holders import ExpertHolder
from workers.experts.sources import ExpertSource, ExpertWeight
from workers.model.config import BankSpec

logger = logging.getLogger(__name__)

NUM_TRIALS = 2
"""Number of experts that each source loads before rates are compared. The first expert does not
count, because its time includes opening files and connections."""
_NUM_LAST = 4
"""Number of most recent experts over which the rate of a source is measured."""
_RETRY_AFTER = 8
"""Multiple of a slower source's time per expert after which the source is measured again."""


class NotHeldError(ProtocolError):
    """No other worker holds the expert. The source can still load other experts."""


class FasterSource:
    """Expert source that reads each expert from one of several sources, usually the fastest."""

    def __init__(
        self, sources: Mapping[str, ExpertSource], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """``sources``: by name. If all sources fail for an expert, ``weights`` raises the error of
        the first."""
        self._sources = dict(sources)
        self._clock = clock
        self._num_tried = dict.fromkeys(sources, 0)
        self._last = {name: deque[tuple[int, float]](maxlen=_NUM_LAST) for name in sources}
        """Size in bytes and loading time in seconds of the most recent experts of each source."""
        self._gave_at = dict.fromkeys(sources, 0.0)
        self._failed: set[str] = set()

    @property
    def num_bytes(self) -> int:
        """Number of bytes that all sources have read so far."""
        return sum(source.num_bytes for source in self._sources.values())

    @property
    def rates(self) -> dict[str, float]:
        """Bytes per second of each source over its most recent experts; 0 before the first
        measurement."""
        return {name: _rate(last) for name, last in self._last.items()}

    def weights(self, bank: BankSpec, expert: int, dtype: torch.dtype) -> Iterator[ExpertWeight]:
        """Yield all matrices of an expert from one source. If the source fails, the next one yields
        all matrices again.

        Raises the error of the first source in ``sources`` if all sources fail.
        """
        errors = []
        for name in self._in_order():
            try:
                yield from self._measured(name, bank, expert, dtype)
            except ExpertMeshError as err:
                logger.warning("expert %d of bank %d: %s", expert, bank.index, err)
                if not isinstance(err, NotHeldError):
                    self._failed.add(name)
                errors.append((name, err))
            else:
                return
        raise dict(errors)[next(iter(self._sources))]

    def close(self) -> None:
        for source in self._sources.values():
            source.close()

    def _measured(
        self, name: str, bank: BankSpec, expert: int, dtype: torch.dtype
    ) -> Iterator[ExpertWeight]:
        """Yield the matrices of an expert from source ``name``, and record the source's rate.

        The time includes storing the weights, because only this reads the data of a mapped file.
        """
        began = self._clock()
        yield from self._sources[name].weights(bank, expert, dtype)
        now = self._clock()
        took_s = now - began
        if self._is_due(name, began):
            self._last[name].clear()
        self._failed.discard(name)
        self._gave_at[name] = now
        self._num_tried[name] += 1
        if self._num_tried[name] > 1:
            self._last[name].append((bank.num_bytes(dtype.itemsize), took_s))

    def _in_order(self) -> list[str]:
        """Return the names of the sources in the order in which to try them for the next expert."""
        rates, now = self.rates, self._clock()

        def rank(name: str) -> tuple[bool, int, bool, float]:
            num_tried = min(self._num_tried[name], NUM_TRIALS)
            return name in self._failed, num_tried, not self._is_due(name, now), -rates[name]

        return sorted(self._sources, key=rank)

    def _is_due(self, name: str, now: float) -> bool:
        """Whether a source has loaded no expert for so long that its rate must be measured
        again."""
        took = [took_s for _, took_s in self._last[name]]
        return bool(took) and now - self._gave_at[name] > _RETRY_AFTER * max(took)


class HoldersSource:
    """Expert source over all workers that hold experts. A worker that failed is not used again."""

    def __init__(
        self,
        holders: Sequence[ExpertHolder],
        connect: Callable[[ExpertHolder], ExpertSource],
        on_read: Callable[[BankSpec, int], None] = lambda bank, expert: None,
    ) -> None:
        """``connect`` makes a source that reads from one worker; ``on_read`` is called with the
        bank and the expert after each expert that was read."""
        self._holders = {holder.name: holder for holder in holders}
        self._connect = connect
        self._on_read = on_read
        self._open: dict[str, ExpertSource] = {}
        self._num_asked = dict.fromkeys(self._holders, 0)

    @property
    def num_bytes(self) -> int:
        """Number of bytes that the sources of all workers have read so far."""
        return sum(source.num_bytes for source in self._open.values())

    def weights(self, bank: BankSpec, expert: int, dtype: torch.dtype) -> Iterator[ExpertWeight]:
        """Yield all matrices of an expert from a worker that holds it. If this worker fails,
        another one yields all matrices again.

        Raises:
            NotHeldError: no usable worker holds the expert.
            ProtocolError: all workers that hold the expert failed.
        """
        what = f"expert {expert} of bank {bank.bank} layer {bank.layer}"
        reason = ""
        while (name := self._least_used_worker(bank, expert)) is not None:
            self._num_asked[name] += 1
            try:
                yield from self._source(name).weights(bank, expert, dtype)
            except ExpertMeshError as err:
                reason = str(err)
                del self._holders[name]
            else:
                self._on_read(bank, expert)
                return
        if not reason:
            raise NotHeldError(f"{what}: no other worker holds it")
        raise ProtocolError(f"{what}: {reason}")

    def close(self) -> None:
        for source in self._open.values():
            source.close()

    def _least_used_worker(self, bank: BankSpec, expert: int) -> str | None:
        """Return the worker that holds the expert and was used least, to spread the load; None if
        there is none."""
        able = [n for n, h in self._holders.items() if expert in h.experts[bank.index]]
        return min(able, key=lambda name: (self._num_asked[name], name), default=None)

    def _source(self, name: str) -> ExpertSource:
        if name not in self._open:
            self._open[name] = self._connect(self._holders[name])
        return self._open[name]


def _rate(last: Sequence[tuple[int, float]]) -> float:
    seconds = sum(took_s for _, took_s in last)
    return sum(num_bytes for num_bytes, _ in last) / max(seconds, 1e-9) if last else 0.0
