"""Loads experts into expert slots while the worker serves, on one thread, command by command.

    controller ── LoadExperts(order, experts, source) ─▶ control thread ─▶ ExpertLoader's queue
    controller ◀─ ExpertsLoaded(order, error, num_bytes) ─ loader thread, after the last matrix

All loads after the start are commands to this thread: experts of a lost worker (``source`` kind
``checkpoint``), and experts that a rebalance moves. A new kind of source is an ``ExpertSource`` and
an entry in the mapping of ``ExpertLoader``; ``source`` in the command names the kind and its
parameters.

A command fills only slots that no current placement uses, so no step reads a slot while it is being
written. A command for other slots comes from a controller that does not know the current placement,
and is refused. An expert that is already in its slot is not read again. On a CPU, a bank grows to
the slots of a command; on a GPU, its capacity is fixed (``--recovery-slots``). Commands run in
order, and each gets one reply. The slots of a failed command have undefined contents.

When a generation starts to run, slots that its placement does not use are freed (``keep_only``).
The release is queued behind earlier commands, which were for this generation or for one that will
never run. Slots that a later generation already uses stay. A slot is marked empty before the last
check against the current placement, and a worker reports its slots only after it has received a new
placement. So the worker never reports a slot that is about to be written or freed.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from cluster.core.errors import ExpertMeshError, ProtocolError
from cluster.core.frames import ExpertsLoaded, LoadExperts
from cluster.core.placement import FREE_SLOT
from workers.experts.slots import ExpertSlots
from workers.experts.sources import ExpertSource

logger = logging.getLogger(__name__)

CHECKPOINT = "checkpoint"
"""Value of ``kind`` in ``LoadExperts.source`` for the source that reads from disk; this kind has no
parameters."""
OpenSource = Callable[[Mapping[str, Any]], ExpertSource]
"""Function that opens a source of experts, given ``LoadExperts.source``."""
SlotOrder = tuple[int, int, int]
"""Entry of a load command: (bank, expert slot, logical expert, or ``FREE_SLOT`` to empty the
slot)."""
Item = TypeVar("Item")
_WAIT_LIMIT_S = 30.0  # longer than a generation waits for this worker
_CHECK_INTERVAL_S = 0.02
"""Interval, in seconds, between checks whether a temporary obstacle has ended."""


@dataclass(frozen=True, slots=True)
class Obstacle:
    """Reason why the slots of a load command must not be written at present."""

    reason: str
    passes: bool
    """Whether the obstacle is temporary: the worker already knows of a newer epoch than its current
    one, and the slots may be free in it."""


class ExpertLoader:
    """Carries out the load commands that the controller sends to one worker, on a thread of its
    own."""

    def __init__(
        self,
        slots: ExpertSlots,
        sources: Mapping[str, OpenSource],
        answer: Callable[[ExpertsLoaded], None],
        *,
        obstacle: Callable[[Sequence[SlotOrder], int], Obstacle | None],
        max_slots: int | None = None,
        min_slots: int = 0,
    ) -> None:
        """``sources``: by ``kind`` in commands. ``answer`` gets each reply, on the loader's thread.

        ``obstacle`` returns why slots must not be written, given the slots and the epoch of their
        command. The loader waits up to ``_WAIT_LIMIT_S`` for a temporary obstacle to end.

        ``max_slots``: fixed number of slots of each bank; None: banks grow. ``min_slots``: number
        of slots that a growing bank keeps at least.
        """
        self._slots = slots
        self._sources = sources
        self._answer = answer
        self._obstacle = obstacle
        self._max_slots = max_slots
        self._min_slots = min_slots
        self._closing = False
        use_one_core = partial(torch.set_num_threads, 1)  # the cores are for the steps
        self._executor = ThreadPoolExecutor(1, "expert-loader", use_one_core)
        self._executor.submit(int)  # start the thread: ``_submit`` could not handle an error

    def order(self, order: LoadExperts) -> None:
        """Queue a load command and return immediately. Any thread may call it."""
        self._submit(self._run_command, order)

    def keep_only(self, used: Sequence[Sequence[int]]) -> None:
        """Queue the release of slots outside ``used`` (see ``ExpertSlots.keep_only``). Any thread
        may call it.

        If the banks have a fixed number of slots, do nothing, because these banks keep their
        memory.
        """
        if self._max_slots is None:
            self._submit(self._free, used)

    def close(self) -> None:
        """Stop after the current matrix. Unfinished load commands get no reply."""
        self._closing = True
        self._executor.shutdown(cancel_futures=True)

    def _submit(self, work: Callable[[Item], None], item: Item) -> None:
        with contextlib.suppress(RuntimeError):  # closed in the meantime
            self._executor.submit(work, item)

    # ---- the thread -------------------------------------------------------------------------

    def _free(self, used: Sequence[Sequence[int]]) -> None:
        try:
            if num_freed := self._slots.keep_only(used, self._min_slots, self._is_needed):
                logger.info("freed %d unused experts", num_freed)
        except Exception:  # out of memory, for example: the worker keeps its slots
            logger.exception("could not free unused experts")

    def _is_needed(self, bank: int, slot: int) -> bool:
        """Whether a step may read the expert slot, in the current epoch or a later one."""
        return self._obstacle([(bank, slot, FREE_SLOT)], sys.maxsize) is not None

    def _run_command(self, order: LoadExperts) -> None:
        error, num_bytes = "", 0
        try:
            num_bytes = self._load(order)
        except ExpertMeshError as err:
            error = str(err)
        except Exception as err:  # out of memory, for example: the command fails, not the worker
            logger.exception("expert load command %d failed", order.order)
            error = f"{type(err).__name__}: {err}"
        if error:
            logger.warning("expert load command %d failed: %s", order.order, error)
        if not self._closing:
            self._answer(ExpertsLoaded(order=order.order, error=error, num_bytes=num_bytes))

    def _load(self, order: LoadExperts) -> int:
        work = self._remaining_work(order)
        self._grow_banks(work)
        open_source = self._sources.get(str(order.source.get("kind", CHECKPOINT)))
        if open_source is None:
            raise ProtocolError(f"no source of kind {order.source.get('kind')!r}")
        source = open_source(order.source)
        try:
            for bank, slot, expert in work:
                if expert == FREE_SLOT:
                    self._slots.clear(bank, slot)
                    continue
                for _ in self._slots.load_expert(bank, slot, expert, source):
                    if self._closing:
                        return source.num_bytes
            return source.num_bytes
        finally:
            source.close()

    def _remaining_work(self, order: LoadExperts) -> list[SlotOrder]:
        """Return the entries of a load command that must still be written, and mark their slots
        empty.

        Waits while a temporary obstacle prevents writing. Raises ``ProtocolError`` if writing is
        not allowed.
        """
        work = self._parse(order)
        deadline = time.monotonic() + _WAIT_LIMIT_S
        while (obstacle := self._obstacle(work, order.epoch)) is not None:
            if not obstacle.passes or self._closing or time.monotonic() > deadline:
                raise ProtocolError(obstacle.reason)
            time.sleep(_CHECK_INTERVAL_S)
        work = [
            (bank, slot, expert)
            for bank, slot, expert in work
            if expert == FREE_SLOT or self._slots.contents(bank).get(slot) != expert
        ]
        held = [self._slots.forget(bank, slot) for bank, slot, _ in work]
        if (obstacle := self._obstacle(work, order.epoch)) is not None:  # it has just appeared
            for (bank, slot, _), was in zip(work, held, strict=True):
                self._slots.restore(bank, slot, was)
            raise ProtocolError(obstacle.reason)
        self._slots.follow_steps()
        return work

    def _parse(self, order: LoadExperts) -> list[SlotOrder]:
        """Check and return the (bank, slot, expert) entries of a load command. Raises
        ``ProtocolError``."""
        banks, work = self._slots.banks, []
        for entry in order.experts:
            if not (isinstance(entry, list) and [type(x) for x in entry] == [int, int, int]):
                raise ProtocolError(f"{entry!r} is not [bank, slot, expert]")
            bank, slot, expert = entry
            if not 0 <= bank < len(banks):
                raise ProtocolError(f"there is no bank {bank}")
            if not FREE_SLOT <= expert < banks[bank].spec.num_experts:
                raise ProtocolError(f"bank {bank} has no expert {expert}")
            limit = 2 * banks[bank].spec.num_experts if self._max_slots is None else self._max_slots
            if not 0 <= slot < max(limit, banks[bank].num_slots):
                raise ProtocolError(f"slot {slot} is beyond the capacity of bank {bank}")
            work.append((bank, slot, expert))
        return work

    def _grow_banks(self, work: Sequence[SlotOrder]) -> None:
        wanted: defaultdict[int, int] = defaultdict(int)
        for bank, slot, expert in work:
            if expert != FREE_SLOT:
                wanted[bank] = max(wanted[bank], slot + 1)
        for bank, num_slots in wanted.items():
            if num_slots > self._slots.banks[bank].num_slots:
                self._slots.banks[bank].resize(num_slots)
