"""Adapters on their way into the engine: read by a thread, made ready between steps."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from cluster.core.errors import CheckpointError, first_line
from cluster.core.frames import Adapter, AdaptersKept, KeepAdapters
from workers.engine.engine import Engine
from workers.lora.adapters import PreparedAdapter

logger = logging.getLogger(__name__)

_TURN_S = 0.02
"""Time between two steps in which adapters are made ready."""
_END = object()


class AdapterIntake:
    """Carries out the controller's newest order. Methods belong to the engine's thread.

    Args:
        engine: has the adapters.
        wake: called, by any thread, when there is something to do.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        engine: Engine,
        wake: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._wake = wake
        self._clock = clock
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="adapter-reader")
        self._order: KeepAdapters | None = None
        self._number = -1
        self._reads: dict[str, Future[PreparedAdapter]] = {}
        """By key, in the order of the order."""
        self._build: tuple[str, Iterator[None]] | None = None
        """What is made ready."""
        self._names: Mapping[str, str] = {}
        """By key; never changed but replaced."""
        self._digests: dict[str, str] = {}
        self._errors: dict[str, str] = {}

    def take(self, order: KeepAdapters) -> None:
        """Free what is not named any more, and begin to read what is missing."""
        if order.number <= self._number:
            return
        self._order, self._number = order, order.number
        wanted = {adapter.key: adapter for adapter in order.adapters}
        self._names = {key: adapter.name for key, adapter in wanted.items()}
        for key in self._engine.adapters.keys:
            if key not in wanted:
                self._engine.drop_adapter(key)
        if self._build is not None and self._build[0] not in wanted:
            self._build = None
        for key in [key for key in self._reads if key not in wanted]:
            self._reads.pop(key).cancel()
        self._digests = {k: digest for k, digest in self._digests.items() if k in wanted}
        self._errors.clear()  # another try
        for key, adapter in wanted.items():
            if key not in self._digests and key not in self._reads:
                self._reads[key] = self._executor.submit(partial(self._read, adapter))
                self._reads[key].add_done_callback(lambda ended: self._wake())

    def go_on(self) -> AdaptersKept | None:
        """Make ready what is read, for a short time; the answer once the order is carried out."""
        end = self._clock() + _TURN_S
        while self._clock() < end and self._has_step():
            pass
        if self._build is not None:
            self._wake()
        if self._order is None or self._reads:
            return None
        number, self._order = self._order.number, None
        return AdaptersKept(number=number, digests=dict(self._digests), errors=dict(self._errors))

    def stats(self, waiting: Mapping[str, int]) -> dict[str, float]:
        """Gauges by metric name without prefix, with 0 for an adapter that no request has.

        ``waiting`` are choices by key that the engine does not have yet. Any thread may call it.
        """
        loaded, names = self._engine.adapters, self._names
        by_state = dict(
            zip(("running", "waiting"), self._engine.sequences_by_adapter(), strict=True)
        )
        by_state["waiting"].update(waiting)
        counts: Counter[tuple[str, str]] = Counter()
        for key in loaded.keys:
            for state, found in by_state.items():
                # A name that is loaded again has two keys until the old one is free.
                counts[state, names.get(key, key)] += found[key]
        return {
            "lora_adapters_loaded": float(len(loaded.keys)),
            "lora_adapters_max": float(loaded.limit),
            "lora_adapters_bytes": float(loaded.num_bytes),
            **{f'lora_requests_{s}{{lora_name="{n}"}}': float(v) for (s, n), v in counts.items()},
        }

    def close(self) -> None:
        """Read nothing more; what is being read ends by itself."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _has_step(self) -> bool:
        """Take one step, if there is any."""
        key = self._next()
        if key is None:
            return False
        try:
            self._step(key)
        except CheckpointError as err:
            self._give_up(key, str(err))
        except Exception as err:  # memory that is missing, for example: the worker serves on
            logger.exception("the adapter %s cannot be loaded", key)
            self._give_up(key, f"{type(err).__name__}: {first_line(err)}")
        return True

    def _next(self) -> str | None:
        """The adapter that is made ready, or the next one."""
        if self._build is not None:
            return self._build[0]
        return next((key for key, read in self._reads.items() if read.done()), None)

    def _step(self, key: str) -> None:
        if self._build is None:
            self._build = key, self._engine.adapters.build(key, self._reads[key].result())
        if next(self._build[1], _END) is _END:
            self._build = None
            self._digests[key] = self._reads.pop(key).result().digest

    def _give_up(self, key: str, error: str) -> None:
        self._build = None
        del self._reads[key]
        self._errors[key] = error

    def _read(self, adapter: Adapter) -> PreparedAdapter:
        """In the thread of the executor."""
        found = self._engine.adapters.read(Path(adapter.path))
        if adapter.digest and found.digest != adapter.digest:
            raise CheckpointError("its files have changed since it was loaded")
        return found
