"""Loading of adapters: threads read them, the engine's thread builds them between steps.

Adapters are read one at a time. A read that hangs, for example on a dead file server, blocks the
other adapters until a command drops its adapter, but does not keep the process from ending.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from cluster.core.errors import CheckpointError, first_line
from cluster.core.frames import AdapterRecord, AdaptersKept, KeepAdapters
from workers.engine.engine import Engine
from workers.lora.adapters import PreparedAdapter

logger = logging.getLogger(__name__)

_BUILD_TIME_S = 0.02
"""Longest time that adapters are built between two steps of the engine."""
_END = object()


@dataclass(frozen=True, slots=True, eq=False)
class _AdapterRead:
    """An adapter that is being read or waits to be read."""

    adapter: AdapterRecord
    found: Future[PreparedAdapter] = field(default_factory=Future)


class AdapterIntake:
    """Loads and frees adapters as the controller's newest command states. Engine's thread only.

    Args:
        engine: holds the adapters.
        wake: called, on any thread, when there is work.
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
        self._command: KeepAdapters | None = None
        self._number = -1
        self._reads: dict[str, _AdapterRead] = {}
        """Adapters to read and build by key, in the order of the command."""
        self._build: tuple[str, Iterator[None]] | None = None
        """Key and remaining build steps of the adapter that is being built, or None."""
        self._names: Mapping[str, str] = {}
        """Names by key; the mapping is replaced, never changed."""
        self._digests: dict[str, str] = {}
        self._errors: dict[str, str] = {}

    @property
    def names(self) -> Mapping[str, str]:
        """Names by key. Any thread may read it."""
        return self._names

    def handle_command(self, command: KeepAdapters) -> None:
        """Free adapters that the command does not name, and start to read missing ones."""
        if command.number <= self._number:
            return
        self._command, self._number = command, command.number
        adapters = {adapter.key: adapter for adapter in command.adapters}
        self._names = {key: adapter.name for key, adapter in adapters.items()}
        for key in self._engine.adapters.keys:
            if key not in adapters:
                self._engine.requests.drop_adapter(key)
        if self._build is not None and self._build[0] not in adapters:
            self._build = None
        for key in [key for key in self._reads if key not in adapters]:
            del self._reads[key]  # a running thread ends by itself
        self._digests = {k: digest for k, digest in self._digests.items() if k in adapters}
        self._errors.clear()  # failed adapters are read again
        for key, adapter in adapters.items():
            if key not in self._digests and key not in self._reads:
                self._reads[key] = _AdapterRead(adapter)
        self._begin_next()

    def advance(self) -> AdaptersKept | None:
        """Build adapters for about 20 ms; return the reply to the command if it is complete."""
        end = self._clock() + _BUILD_TIME_S
        while self._clock() < end and self._has_step():
            pass
        self._begin_next()
        if self._build is not None:
            self._wake()
        if self._command is None or self._reads:
            return None
        number, self._command = self._command.number, None
        return AdaptersKept(number=number, digests=dict(self._digests), errors=dict(self._errors))

    def stats(self, waiting: Mapping[str, int]) -> dict[str, float]:
        """Gauges of loaded adapters and their sequences, by metric name without prefix.

        ``waiting``: number of choices outside the engine by adapter key. Any thread may call it.
        """
        loaded = self._engine.adapters
        counts = self._num_sequences(waiting) if loaded.keys else {}
        return {
            "lora_adapters_loaded": float(len(loaded.keys)),
            "lora_adapters_max": float(loaded.limit),
            "lora_adapters_bytes": float(loaded.num_bytes),
            **{f'lora_requests_{s}{{lora_name="{n}"}}': float(v) for (s, n), v in counts.items()},
        }

    def _num_sequences(self, waiting: Mapping[str, int]) -> Counter[tuple[str, str]]:
        """Number of sequences by state (``running``, ``waiting``) and adapter name; may be 0."""
        names = self._names
        by_state = dict(
            zip(("running", "waiting"), self._engine.requests.sequences_by_adapter(), strict=True)
        )
        by_state["waiting"].update(waiting)
        counts: Counter[tuple[str, str]] = Counter()
        for key in self._engine.adapters.keys:
            for state, numbers in by_state.items():
                # A name that was loaded again has two keys until the old one is freed.
                counts[state, names.get(key, key)] += numbers[key]
        return counts

    def close(self) -> None:
        """Start no further reads; a running read ends by itself."""
        self._reads.clear()

    def _has_step(self) -> bool:
        """Run the next build step of an adapter; False if no adapter can be built now."""
        key = self._next()
        if key is None:
            return False
        try:
            self._step(key)
        except CheckpointError as err:
            self._give_up(key, str(err))
        except Exception as err:  # for example out of memory; the worker continues to serve
            logger.exception("the adapter %s cannot be loaded", key)
            self._give_up(key, f"{type(err).__name__}: {first_line(err)}")
        return True

    def _next(self) -> str | None:
        """The key of the adapter to build: the current one, or the next that was read, or None."""
        if self._build is not None:
            return self._build[0]
        return next((key for key, read in self._reads.items() if read.found.done()), None)

    def _step(self, key: str) -> None:
        if self._build is None:
            self._build = key, self._engine.adapters.build(key, self._reads[key].found.result())
        if next(self._build[1], _END) is _END:
            self._build = None
            self._digests[key] = self._reads.pop(key).found.result().digest

    def _give_up(self, key: str, error: str) -> None:
        self._build = None
        del self._reads[key]
        self._errors[key] = error

    def _begin_next(self) -> None:
        """Start to read the next adapter, unless one is being read."""
        if any(read.found.running() for read in self._reads.values()):
            return
        read = next((r for r in self._reads.values() if not r.found.done()), None)
        if read is not None:
            read.found.set_running_or_notify_cancel()
            name = "adapter-reader"
            reader = threading.Thread(target=self._read, args=(read,), name=name, daemon=True)
            try:
                reader.start()
            except RuntimeError as err:  # the process has reached its limit of threads
                read.found.set_exception(err)
                self._wake()

    def _read(self, read: _AdapterRead) -> None:
        """Read an adapter, in its own thread."""
        try:
            path = Path(read.adapter.path)
            self._engine.adapters.check_place(path)
            prepared = self._engine.adapters.read(path)
            if read.adapter.digest and prepared.digest != read.adapter.digest:
                raise CheckpointError("its files have changed since it was loaded")
        except BaseException as err:
            read.found.set_exception(err)
        else:
            read.found.set_result(prepared)
        self._wake()
