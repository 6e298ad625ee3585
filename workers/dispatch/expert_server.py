"""Expert side of a step: receive rows, compute them for all attention ranks, return outputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch

from cluster.config.cluster import CombineMode
from cluster.core.group_placement import serves
from cluster.core.placement import ExpertPlacement
from cluster.core.topology import Generation
from workers.dispatch.captured_serving import CapturedServes, CapturedServing
from workers.dispatch.copies import EpochTables
from workers.dispatch.device_slots import make_slot_checker
from workers.dispatch.dispatcher import SlotBank, has_known_sizes, picks_rows
from workers.dispatch.expert_counters import ExpertCounters
from workers.dispatch.native_expert_side import NativeServing
from workers.dispatch.recording import FixedTables
from workers.dispatch.row_serving import (
    ExactServing,
    ExpertSide,
    Interleaving,
    RowServing,
    ServedPlace,
    ServedStep,
    StaticServing,
    part_rows,
)
from workers.dispatch.slot_checker import FilledSlots
from workers.metrics.activity import Activity
from workers.metrics.step_metrics import is_measured
from workers.metrics.step_timer import StepTimer
from workers.model.config import BankSpec
from workers.requests.step_header import StepHeader
from workers.transport.transport import DataTransport


class _EpochSlots(NamedTuple):
    """What a placement epoch means for one expert rank and step group."""

    filled: Sequence[FilledSlots]
    has_rows: bool
    """Whether the rank takes part in the exchanges of the step group."""


class ExpertServer:
    """Serves the exchanges of each step on one expert rank. Data thread only."""

    def __init__(
        self,
        transport: DataTransport,
        slots: Sequence[SlotBank],
        banks: Sequence[BankSpec],
        *,
        device_index: int,
        combine_mode: CombineMode,
        dtype: torch.dtype,
        device: torch.device,
        activity: Activity | None = None,
        timer: StepTimer | None = None,
        max_kept_rows: int = 0,
        yields: bool = False,
        group: int = 0,
        counters: ExpertCounters | None = None,
    ) -> None:
        """``slots``: expert slots by ``BankSpec.index``. ``device_index``: this worker's device
        number in placements (``Member.device``).

        On a GPU, steps with known sizes (``has_known_sizes``) are captured as CUDA graphs.
        ``max_kept_rows``: captured steps are kept up to this total number of rows; with 0, one step
        is kept. ``yields``: whether the worker also serves other step groups, between exchanges.
        ``group``: index in ``Generation.groups`` of the step group.
        ``counters``: counters that several servers share; by default the server has its own.
        """
        self.timer = timer or StepTimer()
        """Timer of the laps ``receive``, ``experts`` and ``send`` of each exchange."""
        self.counters = counters or ExpertCounters()
        self._transport = transport
        self._activity = activity or Activity()
        self._banks = tuple(banks)
        self._device = device
        self._device_index = device_index
        self._configured_mode = self._combine_mode = combine_mode
        self._has_graphs = device.type == "cuda"
        self._yields = yields
        self._group = group
        self._interleaving: Interleaving | None = None
        self._epochs = EpochTables[_EpochSlots]()
        self._fixed = FixedTables()
        self._filled_source: Sequence[FilledSlots] = ()
        """Tables of an epoch, from which ``_filled`` was made."""
        self._filled: Sequence[FilledSlots] = ()
        """The tables of ``_filled_source``, at the addresses from which captured steps read."""
        self._slot_checker = make_slot_checker(self.counters, self._banks, device)
        self._side = side = ExpertSide(
            self._banks,
            slots,
            dtype,
            device,
            self._activity,
            self.counters,
            self._slot_checker,
        )
        self._static = StaticServing(side, transport)
        self._exact = ExactServing(side, transport)
        self._native = NativeServing(side, transport, self._static, yields=yields)
        self.captured = CapturedServing(side, transport, self._fixed, max_kept_rows)
        """Serves steps on a GPU by CUDA graphs that it captures."""
        self._places: dict[tuple[bool, ...], Sequence[ServedPlace]] = {}
        """Exchanges of a step, by whether each micro-batch has rows."""
        self._called = self._static
        self._serving: RowServing = self._native
        self._step_places: Sequence[ServedPlace] = ()
        self._num_served = 0
        self._step: ServedStep | None = None
        self._is_captured = False

    def set_interleaving(self, interleaving: Interleaving) -> None:
        """Serve other step groups between parts of large exchanges, on CPUs."""
        if not self._has_graphs:
            self._static.interleaving = self._exact.interleaving = interleaving
            self._interleaving = interleaving

    def set_placement(self, placement: ExpertPlacement, generation: Generation) -> None:
        """Add the table of filled slots of a placement's epoch; drop tables of older generations.

        The counters of the slots are not reset.
        """
        experts = [bank.physical_to_logical[self._device_index] for bank in placement.banks]
        tables = [FilledSlots.of(i, slots, self._device) for i, slots in enumerate(experts)]
        own = generation.group_names[self._group : self._group + 1]
        has_rows = all(serves(placement, self._device_index, group) for group in own)
        self._epochs.add(generation.number, placement.epoch, _EpochSlots(tables, has_rows))
        self._combine_mode = "per_slot" if generation.returns_slots else self._configured_mode
        self.counters.resize([len(slots) for slots in experts])

    def stats(self) -> dict[str, float]:
        """Return the counters of this expert rank by metric name without prefix.

        On a GPU, the seconds of expert slots are left out, as kernels run asynchronously.
        """
        return self.counters.stats(has_slot_seconds=not self._has_graphs)

    def run_step(self, header: StepHeader) -> None:
        """Serve all banks and exchanges of a step, in the order that all ranks use.

        Raises ``PeerLostError`` and ``GenerationChangedError``, and ``ProtocolError`` for an
        unknown epoch.
        """
        self.start_step(header)
        while not self.serve_next():
            pass

    @torch.inference_mode()
    def start_step(self, header: StepHeader) -> None:
        """Start a step; then call ``serve_next`` until it ends. Raises as ``run_step`` does."""
        step = self._begin(header)
        self._serving, self._step_places = self._serving_of(step), self._places_of(step)
        self._serving.begin_step(step, self._step_places)
        self._num_served = 0
        self._mark_next()

    @torch.inference_mode()
    def serve_next(self, *, only_one: bool = False) -> bool:
        """Serve the next exchange, or several, of the started step; end the step after the last.

        ``only_one``: serve only one exchange. Returns whether the step has ended. Raises as
        ``run_step`` does.
        """
        self._native.only_one = only_one
        places, before = self._step_places, self._num_served
        if before < len(places):
            self._num_served = self._serving.serve(before)
        if self._num_served < len(places):
            if self._num_served > before:
                self._mark_next()
            return False
        self._end_step()
        return True

    def _mark_next(self) -> None:
        """Start the lap in which the worker waits for the rows of the next exchange."""
        if self._num_served < len(self._step_places):
            self.timer.mark(self._step_places[self._num_served].bank)

    @property
    def next_ranks(self) -> Sequence[int]:
        """Attention ranks that send rows in the next exchange of the started step."""
        places, step = self._step_places, self._step
        if step is None or self._num_served >= len(places):
            return ()
        return tuple(step.granted[places[self._num_served].micro_batch])

    @property
    def reads_sockets(self) -> bool:
        """Whether native code will read the rows of the next exchange from the sockets."""
        return self._serving is self._native and self._native.is_clear

    def _places_of(self, step: ServedStep) -> Sequence[ServedPlace]:
        key = tuple(map(bool, step.granted))
        if key not in self._places:
            self._places[key] = step.places(self._banks)
        return self._places[key]

    def _serving_of(self, step: ServedStep) -> RowServing:
        """Select the ``RowServing`` that runs a step in ``run_step``."""
        if step.header.exact:
            return self._exact
        most = max((sum(granted.values()) for granted in step.granted), default=0)
        if self._interleaving is not None and most > min(map(part_rows, self._banks)):
            return self._static  # native code computes an exchange as a whole
        may_block = not self._yields  # as a replay of the whole step does
        if (
            may_block
            and self._has_graphs
            and has_known_sizes(step.header, self._banks, step.combine_mode)
        ):
            return self.captured
        return self._native

    # Steps that serve each exchange by a separate call.

    def begin_step(self, header: StepHeader) -> None:
        """Start a step; then call ``serve`` for each exchange. Raises as ``run_step`` does."""
        self._called = self._exact if header.exact else self._static
        self._called.begin_step(self._begin(header), ())

    def serve(self, bank: int, exchange: int) -> None:
        """Serve all micro-batches of one exchange. Raises the errors of ``run_step``."""
        step, spec = self._step, self._banks[bank]
        assert step is not None, "begin_step was not called"
        for micro_batch, granted in enumerate(step.granted):
            if granted:
                self.timer.mark(spec)
                self._called.serve_place(ServedPlace(spec, exchange, micro_batch))
        is_last = (bank, exchange) == (len(self._banks) - 1, len(spec.exchanges) - 1)
        if is_last and not self._is_captured:
            self._end_step()

    @contextmanager
    def as_captured(self, header: StepHeader, transport: DataTransport) -> Iterator[CapturedServes]:
        """Context in which ``serve`` captures a step on a GPU, without counting the step.

        ``transport`` records the step's messages. Yields the counts that each replay adds.
        """
        self._step, self._is_captured = self._step_of(header, is_timed=False), True
        self._called = StaticServing(self._side, transport)
        try:
            with self.captured.capturing(self._step, self._called) as served:
                yield served
        finally:
            self._is_captured = False

    def end_replay(self) -> None:
        """End a replayed step: count its slots, and reject a rank that sent an invalid slot.

        Raises ``PeerLostError`` if it rejects a rank. Call it after the host has waited for the
        step.
        """
        self._transport.confirm_step()
        self._slot_checker.end(self._transport.reject)

    def _begin(self, header: StepHeader) -> ServedStep:
        self.timer.begin_step(header)
        with self._activity:
            self._transport.begin_step(header)
        self._step = step = self._step_of(header, is_timed=is_measured(header))
        return step

    def _step_of(self, header: StepHeader, *, is_timed: bool) -> ServedStep:
        self._slot_checker.begin()
        filled, has_rows = self._epochs.begin_step(header)
        if self._has_graphs:
            filled = self._at_fixed_addresses(filled)
        ranks = header.grants.positions
        counts = (header.edge_counts(i) for i in range(header.num_micro_batches))
        granted = [{r: n for r, n in zip(ranks, own, strict=True) if n} for own in counts]
        if not has_rows:
            granted = [{}] * len(granted)
        return ServedStep(
            header,
            self._combine_mode,
            filled,
            granted,
            self.counters.num_bytes,
            self.timer,
            picks_rows(header, self._banks, self._combine_mode) or is_timed,
            is_timed and not self._has_graphs,
        )

    def _at_fixed_addresses(self, filled: Sequence[FilledSlots]) -> Sequence[FilledSlots]:
        """Return ``filled`` with tables at the addresses from which captured steps read."""
        if filled is not self._filled_source:
            tables = self._fixed.copy_in([own.table for own in filled])
            pairs = zip(filled, tables, strict=True)
            self._filled_source = filled
            self._filled = [replace(own, table=table) for own, table in pairs]
        return self._filled

    def _end_step(self) -> None:
        """Wait for the step's messages, count its slots, and reject a rank that sent an invalid
        slot. Raises ``PeerLostError`` and ``GenerationChangedError``."""
        with self._activity:
            self._transport.finish_step()
            self._transport.confirm_step()
        self._slot_checker.end(self._transport.reject)
