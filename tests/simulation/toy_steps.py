"""A step of the toy model over the real data plane: rows to the experts, values back.

The two sides exchange frames as the real dispatcher and expert server do, in the same order, to the
same ranks, with the same waits. A ROWS frame names one expert slot for each (row, choice) that is
for this rank; the OUTPUTS frame returns the value of each.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from cluster.core.errors import TransportError
from cluster.core.group_placement import bank_of, serves
from cluster.core.placement import BankPlacement, ExpertPlacement
from cluster.core.topology import Generation
from tests.simulation.kernel import Kernel
from tests.simulation.toy_adapters import ToyAdapters
from tests.simulation.toy_model import (
    Drawing,
    ToyCache,
    ToyResult,
    banks,
    beam_candidates,
    chosen_experts,
    first_state,
    next_state,
    rows_of,
)
from workers.dispatch.copies import EpochTables
from workers.dispatch.expert_server import ExpertServer
from workers.dispatch.row_serving import ExpertSide, ServedPlace, ServedStep, StaticServing
from workers.engine.engine import Engine
from workers.engine.expert_load import RoutedRows
from workers.engine.step_sampler import StepTokens
from workers.requests.request import TokenLogprob
from workers.requests.sequence import SequenceState
from workers.requests.step_header import StepHeader
from workers.sampling.sampler import SampledToken
from workers.scheduling.step_plan import PlannedRows, StepPlan
from workers.speculation.acceptance import num_accepted
from workers.transport.frames import FrameHeader, FrameKind
from workers.transport.sockets import SocketTransport
from workers.transport.transport import Tag

Places = Mapping[int, Sequence[tuple[int, int]]]
"""Expert -> (rank, slot) of its copies; the first serves decodes."""
_LEFT_OUT = 0.02
"""Share of the steps in which an expert rank needed more rows than were sent to it."""
_READ_AT_ONCE = 0.2
"""Share of the steps before whose reading no other step may begin."""


def work(mean_s: float) -> None:
    """Computation that takes time."""
    kernel = Kernel.current
    assert kernel is not None
    assert kernel.process is not None
    stall_s, kernel.process.stall_s = kernel.process.stall_s, 0.0
    kernel.sleep((0.5 + kernel.rng.random()) * mean_s * kernel.slowness + stall_s)


class ToyTransport(SocketTransport):
    """Frames of plain bytes."""

    def check(self, generation: int) -> None:
        """Raise the error of a step of this generation whose messages are lost."""
        self._connections.check()
        if self._connections.generation.number != generation:
            raise TransportError("the step belongs to an earlier generation")

    def post_bytes(self, tag: Tag, rank: int, count: int, data: bytes) -> None:
        header = self._header(tag, (count, 0), len(data))
        self._connections.send(self._names[rank], header, [data])

    def receive_bytes(self, tag: Tag, ranks: Sequence[int]) -> list[tuple[int, bytes]]:
        """(count, bytes) of each rank."""
        deadline = time.monotonic() + self._connections.step_timeout_s
        want = self._header(tag)
        names = [self._names[rank] for rank in ranks]
        found = []
        for i, name in enumerate(names):
            frame = self._connections.receive(name, want, deadline, names[i + 1 :])
            found.append((frame.header.counts[0], bytes(frame.payload.data)))
        return found


class ToyDispatcher:
    """In place of ``RemoteDispatcher``. Some steps have left rows out, and must run again."""

    edge_share = 0
    allows_ahead = False

    def __init__(
        self, transport: ToyTransport, specs: Any, *, rank: int, activity: Any, timer: Any, **_: Any
    ) -> None:
        self._transport, self._rank, self._activity = transport, rank, activity
        self._timer = timer
        self._epochs = EpochTables[tuple[tuple[int, ...], list[Places]]]()
        self._tables: list[Places] = []
        self._ranks: tuple[int, ...] = ()
        self._header: StepHeader | None = None

    def set_placement(self, placement: ExpertPlacement, generation: Generation) -> None:
        (group,) = (m.group for m in generation.attention if m.rank == self._rank)
        members = [m for m in generation.experts if serves(placement, m.device, group)]
        rank_of = {m.device: m.rank for m in members}
        tables = [_places(bank_of(bank, group), rank_of) for bank in placement.banks]
        ranks = tuple(m.rank for m in members)
        self._epochs.add(generation.number, placement.epoch, (ranks, tables))

    def begin_step(self, header: StepHeader) -> None:
        self._ranks, self._tables = self._epochs.begin_step(header)
        self._timer.begin_step(header)
        self._header = header
        self._transport.begin_step(header)
        kernel = Kernel.current
        assert kernel is not None
        self.allows_ahead = kernel.rng.random() >= _READ_AT_ONCE

    def finish_later(self) -> Callable[[], bool]:
        """The step is lost, as with messages of a device, if its peers are lost before it is read,
        or its generation has ended."""
        is_complete, transport, header = self.end_step(), self._transport, self._header
        assert header is not None

        def finish() -> bool:
            transport.check(header.generation)
            return is_complete

        return finish

    def follow_step(self) -> None:
        self._timer.restart()

    def run_empty_step(self, header: StepHeader) -> None:
        self._timer.begin_step(header)
        self._epochs.forget(header.oldest_epoch)

    def end_step(self) -> bool:
        kernel = Kernel.current
        assert kernel is not None
        return kernel.rng.random() >= _LEFT_OUT

    def exchange(self, bank: int, rows: Sequence[tuple[tuple[int, ...], int]]) -> list[list[int]]:
        """Values of the experts of each row; a row is (experts, its key, -1 for a decode)."""
        table = self._tables[bank]
        wanted: dict[int, list[int]] = {rank: [] for rank in self._ranks}
        places: list[list[tuple[int, int]]] = []
        for experts, key in rows:
            mine = []
            for expert in experts:
                copies = table[expert]
                rank, slot = copies[0] if key < 0 else copies[key % len(copies)]
                mine.append((rank, len(wanted[rank])))
                wanted[rank].append(slot)
            places.append(mine)
        for rank in self._ranks:
            data = struct.pack(f"!{len(wanted[rank])}H", *wanted[rank])
            tag = Tag(bank, 0, 0, "rows")
            self._transport.post_bytes(tag, rank, len(wanted[rank]), data)
        with self._activity:
            received = self._transport.receive_bytes(Tag(bank, 0, 0, "outputs"), self._ranks)
        values = {
            rank: struct.unpack(f"!{count}I", data)
            for rank, (count, data) in zip(self._ranks, received, strict=True)
        }
        return [[values[rank][i] for rank, i in mine] for mine in places]


def _places(bank: BankPlacement, rank_of: Mapping[int, int]) -> Places:
    found = {}
    for expert in range(bank.num_experts):
        first = bank.decode_device[expert]
        copies = sorted(bank.logical_to_physical(expert), key=lambda place: place[0] != first)
        found[expert] = [(rank_of[device], slot) for device, slot in copies if device in rank_of]
    return found


class ToyRunner:
    """In place of ``ModelRunner``."""

    first_dispatch: float | None = None

    def __init__(
        self, cache: ToyCache, dispatcher: ToyDispatcher, rank: int, adapters: ToyAdapters
    ) -> None:
        self._cache, self.dispatcher, self._rank = cache, dispatcher, rank
        self._adapters = adapters
        self.graphs: Any = self
        """Says which steps may run ahead, as ``DecodeGraphs`` does."""
        self._newest: Mapping[SequenceState, int] = {}
        """The tokens that the latest step has drawn."""
        self.num_ahead = 0
        """Steps that began before the step before was read."""
        self.num_lost = 0
        """Those of them that were lost with the step before."""

    def is_captured(self, header: StepHeader) -> bool:
        return not header.prefill_rows

    def run(
        self, header: StepHeader, plan: StepPlan, *, is_ahead: bool = False
    ) -> ToyResult | None:
        self.first_dispatch = None
        self.num_ahead += is_ahead
        self.num_lost += is_ahead
        if not header.grant(self._rank).num_rows:
            assert not plan.rows, "rows without a grant"
            self.dispatcher.run_empty_step(header)
            return None
        self.dispatcher.begin_step(header)
        rows = list(rows_of(plan.rows, self._newest if is_ahead else {}))
        contents: list[list[int]] = [[] for _ in rows]
        routed = []
        for bank in range(len(banks())):
            work(0.006)
            self.first_dispatch = self.first_dispatch or time.monotonic()
            wanted = [
                (chosen_experts(token, position, bank), -1 if p.is_decode else token + position)
                for p, token, position in rows
            ]
            for mine, values in zip(contents, self.dispatcher.exchange(bank, wanted), strict=True):
                mine += values
            ids = torch.from_numpy(np.array([experts for experts, _ in wanted]).reshape(-1, 2))
            num_decodes = sum(p.count for p in plan.rows if p.is_decode)
            routed.append([RoutedRows(ids, None, num_decodes)])
        if not plan.rows:
            return None
        self.num_lost -= is_ahead
        states = self._advance(rows, contents)
        drawn = None if header.prefill_rows else _late_tokens(plan, states)
        self._newest = drawn or {}
        return ToyResult(states, routed, drawn)

    def _advance(
        self, rows: Sequence[tuple[Any, int, int]], contents: Sequence[Sequence[int]]
    ) -> tuple[Sequence[int], ...]:
        """Write the state after each row; those of each entry."""
        states: dict[int, list[int]] = {}
        cache, size = self._cache, self._cache.block_size
        for (planned, token, position), values in zip(rows, contents, strict=True):
            blocks = planned.sequence.blocks
            if not position:
                state = first_state(planned.sequence.request.cache_salt)
            else:
                before = position - 1
                state = cache.slots[blocks[before // size] * size + before % size]
            adapter = self._adapters.value(planned.sequence.request.adapter)
            state = next_state(state, token, [*values, *adapter])
            cache.slots[blocks[position // size] * size + position % size] = state
            states.setdefault(id(planned), []).append(state)
        return tuple(states.values())


class ToySampler:
    """In place of ``StepSampler``."""

    def __init__(self, inspector: Any) -> None:
        self.inspector = inspector
        self._processors: dict[Any, object] = {}
        """By sequence, from its start to its end."""

    def start(self, sequence: Any, grammar: object) -> None:
        self._processors[sequence] = grammar

    def end(self, sequence: Any) -> None:
        del self._processors[sequence]

    def prepare(self, plan: StepPlan) -> None:
        pass

    def is_drawn_only(self, sequence: SequenceState) -> bool:
        return sequence.grammar is None and sequence.params.beams is None

    def sample(self, plan: StepPlan, result: ToyResult) -> StepTokens:
        tokens = StepTokens()
        for planned, states in zip(plan.rows, result.states, strict=True):
            sequence = planned.sequence
            if planned.samples_token:
                tokens.complete[sequence] = 0
                drawn = _draw(planned, states)
                accepted = num_accepted(planned.drafts, drawn, [True] * len(drawn))
                tokens.drawn[sequence] = [SampledToken(token) for token in drawn[: accepted + 1]]
                if sequence.params.beams is not None:
                    tokens.candidates[sequence] = _candidates(sequence, states[-1])
        return tokens


def _draw(planned: PlannedRows, states: Sequence[int]) -> list[int]:
    """The token behind the newest one, and those behind each draft if all before are right."""
    sequence, params = planned.sequence, planned.sequence.params
    drawing = Drawing(seed=params.seed, choice=sequence.choice, top_k=params.top_k)
    behind = states[-1 - len(planned.drafts) :]
    grammar: Any = sequence.grammar
    last = planned.first + planned.count - sequence.prompt_length
    return [
        drawing.next_token(s, n, grammar) for n, s in enumerate(behind, last - len(planned.drafts))
    ]


def _late_tokens(
    plan: StepPlan, states: Sequence[Sequence[int]]
) -> Mapping[SequenceState, int] | None:
    """The token of each row, if none is a draft or needs a grammar."""
    if any(rows.drafts or rows.sequence.grammar is not None for rows in plan.rows):
        return None
    pairs = zip(plan.rows, states, strict=True)
    return {rows.sequence: _draw(rows, own)[0] for rows, own in pairs}


def _candidates(sequence: SequenceState, state: int) -> list[TokenLogprob]:
    request = sequence.request
    return beam_candidates(state, request.n, request.params.stop_token_ids)


class ToyEngine(Engine):
    """The engine, with the toy in place of model, cache and sampler."""

    def __init__(self, *, dispatcher: ToyDispatcher, rank: int = 0, **more: Any) -> None:
        more["clock"] = time.monotonic
        super().__init__(dispatcher=dispatcher, rank=rank, **more)  # type: ignore[arg-type]
        cache: Any = ToyCache(self.pool.num_blocks, self.cache.block_size)
        self.cache = self._memory.cache = self.kv_store.cache = cache
        adapters: Any = self.adapters
        self.runner = ToyRunner(cache, dispatcher, rank, adapters)  # type: ignore[assignment]
        sampler: Any = ToySampler(self._step_sampler.inspector)
        self._step_sampler = self.requests._sampler = self.steps.sampler = sampler
        self.steps.model = self.runner


class ToyServing(StaticServing):
    """The toy's exchange."""

    _transport: ToyTransport
    _step: ServedStep

    def __init__(self, side: ExpertSide, transport: Any) -> None:
        super().__init__(side, transport)
        self._known: dict[int, tuple[torch.Tensor, frozenset[int]]] = {}

    def serve_place(self, place: ServedPlace) -> None:
        bank = place.bank
        ranks = list(self._step.granted[place.micro_batch])
        with self._side.activity:
            received = self._transport.receive_bytes(Tag(bank.index, 0, 0, "rows"), ranks)
        started = time.monotonic()
        work(0.003)
        if self.interleaving is not None and self.interleaving.is_needed():
            self.interleaving.serve_others()
        work(0.002)
        self._side.counters.slot_seconds += time.monotonic() - started
        slots: Any = self._side.slots[bank.index]
        contents, filled = slots.values, self._filled_slots(bank.index)
        for rank, (count, data) in zip(ranks, received, strict=True):
            wanted = struct.unpack(f"!{count}H", data)
            if not filled.issuperset(wanted):
                missing = next(slot for slot in wanted if slot not in filled)
                self._transport.reject(rank, f"no expert in slot {missing} of bank {bank.index}")
            values = struct.pack(f"!{count}I", *[contents[slot] for slot in wanted])
            self._transport.post_bytes(Tag(bank.index, 0, 0, "outputs"), rank, count, values)

    def _filled_slots(self, bank: int) -> frozenset[int]:
        """Slots that hold an expert in the step's epoch."""
        table = self._step.filled[bank].table
        known = self._known.get(bank)
        if known is None or known[0] is not table:
            places = enumerate(table.tolist()[:-1])
            known = self._known[bank] = table, frozenset(slot for slot, full in places if full)
        return known[1]


class ToyExpertServer(ExpertServer):
    """The expert server, with the toy's exchange."""

    def _serving_of(self, step: ServedStep) -> ToyServing:
        self._toy: ToyServing = getattr(self, "_toy", ToyServing(self._side, self._transport))
        self._toy.interleaving = self._interleaving
        return self._toy


__all__ = ["FrameHeader", "FrameKind", "ToyDispatcher", "ToyEngine", "ToyExpertServer", "work"]
