"""Load experts into expert slots while the worker serves: a thread of its own, on orders.

    controller ── LoadExperts(order, experts, source) ─▶ control thread ─▶ ExpertLoader's queue
    controller ◀─ ExpertsLoaded(order, error, num_bytes) ─ loader thread, one matrix after another

This is the one mechanism for weights that come later than the start: the experts of a lost worker
(``source`` kind ``checkpoint``), and those that a rebalancing moves. A further kind of source is an
``ExpertSource`` and an entry in the mapping that ``ExpertLoader`` is given; the order's ``source``
says which one, and what it needs to know.

An order fills slots that no placement in force names, so that steps never read what is being
written; kernels allow that (``ExpertKernel``). On a CPU a bank grows to the slots that are asked
for; on a GPU it has its capacity (``--recovery-slots``). Orders are carried out one after the
other; each is answered once, and one that fails leaves its slots without meaning.

When a generation runs, what its maps do not name is freed (``keep_only``), in turn with the orders:
those that came before it were for this generation, or for one that will never run.
"""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch

from cluster.control_frames import ExpertsLoaded, LoadExperts
from cluster.errors import ExpertMeshError, ProtocolError
from cluster.placement import FREE_SLOT
from workers.experts.slots import ExpertSlots
from workers.experts.sources import ExpertSource

logger = logging.getLogger(__name__)

CHECKPOINT = "checkpoint"
"""Kind of the source that reads from disk; needs nothing else."""
OpenSource = Callable[[Mapping[str, Any]], ExpertSource]
"""Opens a source; gets ``LoadExperts.source``."""
_END_LIMIT_S = 5.0


@dataclass(frozen=True, slots=True)
class _Keep:
    """What is not in use is to be freed."""

    used: Sequence[Sequence[int]]
    """As for ``ExpertSlots.keep_only``."""


class ExpertLoader:
    """Carries out the load orders of one worker."""

    def __init__(
        self,
        slots: ExpertSlots,
        sources: Mapping[str, OpenSource],
        answer: Callable[[ExpertsLoaded], None],
        *,
        max_slots: int | None = None,
        min_slots: int = 0,
    ) -> None:
        """``sources`` by kind; ``answer`` is called on the loader's thread.

        ``max_slots`` is the capacity of a bank where it cannot grow, ``min_slots`` what it keeps
        where it can.
        """
        self._slots = slots
        self._sources = sources
        self._answer = answer
        self._max_slots = max_slots
        self._min_slots = min_slots
        self._orders: SimpleQueue[LoadExperts | _Keep | None] = SimpleQueue()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="expert-loader", daemon=True)
        self._thread.start()

    def order(self, order: LoadExperts) -> None:
        """Queue an order; returns at once. Any thread."""
        self._orders.put(order)

    def keep_only(self, used: Sequence[Sequence[int]]) -> None:
        """Free what is not in ``used`` (see ``ExpertSlots``) after the orders so far. Any thread.

        Where banks cannot grow their memory is for these slots anyway: nothing happens.
        """
        if self._max_slots is None:
            self._orders.put(_Keep(used))

    def close(self) -> None:
        """End after the matrix that is being read; what is left is not answered."""
        self._closing = True
        self._orders.put(None)
        self._thread.join(_END_LIMIT_S)

    # ---- the thread -------------------------------------------------------------------------

    def _run(self) -> None:
        torch.set_num_threads(1)  # the cores belong to the steps
        while (order := self._orders.get()) is not None and not self._closing:
            if isinstance(order, _Keep):
                self._free(order)
                continue
            reply = self._carry_out(order)
            if not self._closing:
                self._answer(reply)

    def _free(self, keep: _Keep) -> None:
        try:
            if num_freed := self._slots.keep_only(keep.used, self._min_slots):
                logger.info("freed %d experts that are not used here any more", num_freed)
        except Exception:  # out of memory, for example: the worker goes on with what it has
            logger.exception("experts that are not used cannot be freed")

    def _carry_out(self, order: LoadExperts) -> ExpertsLoaded:
        """Load everything, or say what is in the way."""
        error, num_bytes = "", 0
        try:
            num_bytes = self._load(order)
        except ExpertMeshError as err:
            error = str(err)
        except Exception as err:  # out of memory, for example: the worker goes on without
            logger.exception("load order %d failed", order.order)
            error = f"{type(err).__name__}: {err}"
        if error:
            logger.warning("load order %d: %s", order.order, error)
        return ExpertsLoaded(order=order.order, error=error, num_bytes=num_bytes)

    def _load(self, order: LoadExperts) -> int:
        work = self._parse(order)
        self._make_room(work)
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

    def _parse(self, order: LoadExperts) -> list[tuple[int, int, int]]:
        """(bank, slot, expert) of an order, all of them possible. Raises ``ProtocolError``."""
        banks, work = self._slots.banks, []
        for entry in order.experts:
            if not (isinstance(entry, list) and [type(x) for x in entry] == [int, int, int]):
                raise ProtocolError(f"{entry!r} is no [bank, slot, expert]")
            bank, slot, expert = entry
            if not 0 <= bank < len(banks):
                raise ProtocolError(f"there is no bank {bank}")
            if not FREE_SLOT <= expert < banks[bank].spec.num_experts:
                raise ProtocolError(f"bank {bank} has no expert {expert}")
            limit = 2 * banks[bank].spec.num_experts if self._max_slots is None else self._max_slots
            if not 0 <= slot < max(limit, banks[bank].num_slots):
                raise ProtocolError(f"bank {bank} has no room for slot {slot}")
            work.append((bank, slot, expert))
        return work

    def _make_room(self, work: list[tuple[int, int, int]]) -> None:
        """Grow each bank once."""
        wanted: defaultdict[int, int] = defaultdict(int)
        for bank, slot, expert in work:
            if expert != FREE_SLOT:
                wanted[bank] = max(wanted[bank], slot + 1)
        for bank, num_slots in wanted.items():
            if num_slots > self._slots.banks[bank].num_slots:
                self._slots.banks[bank].resize(num_slots)
