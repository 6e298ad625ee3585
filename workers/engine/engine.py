"""The engine of one attention worker: schedule, run, sample, commit, emit.

A step changes no sequence before the model ran to its last layer and the tokens are drawn: when a
peer is lost in the middle, every sequence stays as it was, and the step can run again with the same
result. The engine belongs to one thread; other threads may only read ``stats`` and the number of
blocks.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from msgspec.structs import replace as replace_rows

from cluster.config.cluster import EngineSection
from cluster.config.kv_cache import kv_vector_bytes
from cluster.config.lora import LoraSection
from cluster.config.speculation import SpeculationSection
from cluster.core.checks import check
from cluster.core.errors import ModelNotFoundError, RequestError
from workers.beams.group import BeamGroup, new_group
from workers.dispatch.dispatcher import CapturableDispatcher, TokenDispatcher
from workers.engine.batch import next_tokens
from workers.engine.choices import open_choices
from workers.engine.deadlines import Deadlines
from workers.engine.decode_graphs import DecodeGraphs
from workers.engine.expert_load import LoadCounter
from workers.engine.isolation import Isolation
from workers.engine.model_runner import ModelRunner, StepResult
from workers.engine.request_checks import RequestLimits, check_request, check_room
from workers.engine.step_sampler import StepSampler, StepTokens
from workers.kv.block_pool import BlockPool
from workers.kv.cache import KVCache
from workers.kv.contents import BlockContents
from workers.kv.state_slots import StateSlots
from workers.kv.tiers.tiers import KvTiers
from workers.kv.transfer.store import Fetch, KvTransferStore
from workers.kv.transfer.turn_copies import TurnCopies
from workers.lora.loaded import LoadedAdapters
from workers.metrics.histogram import TOKEN_BUCKETS, Histogram
from workers.metrics.traced_steps import TracedRequests
from workers.model.compute_threads import ComputeThreads
from workers.model.config import BankSpec, ModelConfig
from workers.model.layers import AttentionModel
from workers.native.team import Team
from workers.requests.block_hash import BlockHash
from workers.requests.buckets import buckets_up_to
from workers.requests.classifier import pooled
from workers.requests.request import (
    FinishReason,
    Queued,
    Request,
    SoloStep,
    TokenLogprob,
    TokenOutput,
)
from workers.requests.sequence import NOT_FINITE, Ending, Failure, SequenceState
from workers.requests.step_header import StepHeader
from workers.sampling.grammar import CompiledGrammar
from workers.sampling.sampler import SampledToken
from workers.scheduling.scheduler import Scheduler
from workers.scheduling.step_intent import Restriction, StepIntent
from workers.scheduling.step_plan import PlannedRows, RowsWanted, StepPlan
from workers.speculation.speculator import Speculator

_POISONOUS = Failure(
    "a third worker in a row was lost with this request, which was alone in its step",
    "poisonous_request",
)
"""The request is at fault, as far as can be known; see ``workers.engine.isolation``."""


class Engine:
    """Requests in, tokens out, one step at a time."""

    def __init__(
        self,
        *,
        model: AttentionModel,
        config: ModelConfig,
        banks: Sequence[BankSpec],
        dispatcher: TokenDispatcher,
        section: EngineSection,
        speculation: SpeculationSection | None = None,
        max_model_len: int | None = None,
        rank: int = 0,
        compute_threads: ComputeThreads | None = None,
        team: Team | None = None,
        clock: Callable[[], float] = time.monotonic,
        is_exact: bool = False,
        lora: LoraSection | None = None,
    ) -> None:
        """Allocates the KV cache on the model's device. Raises ``ConfigError``.

        ``is_exact``: what is drawn from a row does not depend on other rows, to the last bit.
        ``max_model_len`` None takes the checkpoint's context. The model must have been loaded with
        at least so many positions. ``team`` draws tokens with a native kernel; None: torch does.
        """
        self._section = section
        self._pad = config.pad_token_id
        self._has_predictor = config.has_predictor
        self._rank = rank
        self._clock = clock
        self.max_model_len = max_model_len or config.context_tokens
        """Context limit in tokens."""
        block_size = section.block_size_tokens
        kind, itemsize = section.kv_cache_dtype, model.dtype.itemsize
        vector_bytes = kv_vector_bytes(kind, config.head_dim, itemsize)
        token_bytes = config.kv_vectors_per_token * vector_bytes
        num_blocks = section.num_kv_blocks(token_bytes, self.max_model_len)
        self._limits = RequestLimits(
            vocab_size=config.vocab_size,
            eos_token_ids=tuple(config.eos_token_ids),
            max_model_len=self.max_model_len,
            block_size=block_size,
            num_blocks=num_blocks,
            hidden_size=config.hidden_size,
            is_classifier=bool(config.labels),
        )
        self.states = _state_slots(config, section)
        """Which recurrent states are free; None: the model has none."""
        self.cache = KVCache(
            config=config,
            num_blocks=num_blocks,
            block_size=block_size,
            dtype=model.dtype,
            device=model.device,
            compute_threads=compute_threads or ComputeThreads(),
            kv_cache_dtype=kind,
            num_states=0 if self.states is None else self.states.num_slots,
        )
        self.pool = BlockPool(num_blocks, int(num_blocks * section.kv_kept_share))
        """Which KV blocks are free, and what the others hold."""
        speculation = speculation or SpeculationSection()
        self._speculator = _speculator(config, speculation, self.max_model_len)
        self._max_decode_rows = section.max_num_seqs + speculation.max_draft_rows
        self._scheduler = Scheduler(
            self.pool,
            block_size=block_size,
            max_num_seqs=section.max_num_seqs,
            max_num_batched_tokens=section.max_num_batched_tokens,
            max_model_len=self.max_model_len,
            eos_token_ids=config.eos_token_ids,
            enable_prefix_caching=section.enable_prefix_caching,
            length_matters_above=config.length_matters_above,
            states=self.states,
            speculator=self._speculator,
            max_draft_rows=speculation.max_draft_rows,
        )
        self.kv_store = KvTransferStore(self.pool, self.cache, self.states)
        """Blocks that other workers fetch, and that are fetched from them."""
        self._tiers: KvTiers | None = None
        self.adapters = LoadedAdapters(model, lora or LoraSection())
        """Those that requests may name."""
        self.runner = ModelRunner(
            model=model,
            adapters=self.adapters,
            cache=self.cache,
            tables=self._scheduler.tables,
            banks=banks,
            dispatcher=dispatcher,
            rank=rank,
        )
        self._banks = tuple(banks)
        self._eos = frozenset(config.eos_token_ids)
        self._requests: dict[str, list[SequenceState]] = {}
        self._groups: dict[str, BeamGroup] = {}
        """Of requests that search with beams."""
        self._adapter_uses: Counter[str] = Counter()
        """Requests by adapter."""
        self._deadlines = Deadlines()
        self._step_sampler = StepSampler(config, banks, model.head, is_exact, team)
        self._isolation = Isolation()
        self._intent = StepIntent()
        """Of the rows that were proposed last."""
        self._to_pause: dict[str, int] = {}
        """Request id -> tokens that each of its choices must have before."""
        self._paused: set[str] = set()
        self._pending: list[TokenOutput] = []
        self._traced = TracedRequests()
        self._num_received = 0
        steps = ("steps_total", "steps_abandoned_total", "steps_repeated_total")
        tokens = ("prompt_tokens_total", "generation_tokens_total")
        self._counters = dict.fromkeys((*steps, *tokens), 0)
        self._iteration_tokens = Histogram(TOKEN_BUCKETS)
        self._ended = Counter(dict.fromkeys(FinishReason, 0))
        self.load = LoadCounter(banks, self.cache.side)
        """Tokens by expert and copy, of committed steps."""
        self.runner.graphs = self._new_graphs(dispatcher)

    def use(self, dispatcher: TokenDispatcher) -> None:
        """Exchange rows through this dispatcher from now on; there must be no requests."""
        assert not self._requests
        self._scheduler.tables.forget_changes()
        self.runner.dispatcher = dispatcher
        self.runner.graphs = self._new_graphs(dispatcher)

    def _new_graphs(self, dispatcher: TokenDispatcher) -> DecodeGraphs | None:
        """Graphs over a dispatcher; None where steps cannot be captured."""
        is_eager = self._section.enforce_eager or self.states is not None
        is_eager = is_eager or self._has_predictor
        if is_eager or not self.cache.is_read_in_place:
            return None
        if not isinstance(dispatcher, CapturableDispatcher):
            return None
        return DecodeGraphs(
            self.runner.compute,
            lambda: id(self.runner.model),
            dispatcher,
            self.cache,
            self._scheduler.tables,
            [bank.top_k for bank in self._banks],
            buckets_up_to(self._max_decode_rows),
            self._rank,
        )

    # Requests

    def add_request(
        self,
        request: Request,
        received: float | None = None,
        grammar: CompiledGrammar | None = None,
        hashes: Sequence[BlockHash] = (),
    ) -> None:
        """Queue a request received at ``received`` (on this engine's clock; None: now).

        ``grammar`` is the request's own, compiled; ``hashes`` are those of the prompt's first full
        blocks, where they are known already. A newer attempt at a known request replaces the
        older one. Raises ``RequestError`` for a request that can never run and ``QueueFullError``
        when too much waits; then nothing has changed.
        """
        check_request(request, self._limits)
        if request.adapter and request.adapter not in self.adapters:
            raise ModelNotFoundError("the adapter of the request is not loaded any more")
        if self._limits.is_classifier and request.inspection is None:
            request, whole = pooled(request, self._pad), request
            hashes = hashes if request is whole else ()
        self._step_sampler.inspector.check(request)
        self._check_room(request)
        now = self._clock() if received is None else received
        grammars = open_choices(request, grammar, self._num_received, now)
        next(iter(grammars)).block_hashes += hashes  # other choices have them from the first
        self.abort(request.request_id)
        self._requests[request.request_id] = list(grammars)
        if (group := new_group(next(iter(grammars)), self._eos)) is not None:
            self._groups[request.request_id] = group
        self._adapter_uses[request.adapter] += 1
        self._isolation.enter(request.request_id, request.num_deaths)
        self._traced.enter(request)
        self._num_received += 1
        self._counters["prompt_tokens_total"] += len(request.prompt)
        for sequence, state in grammars.items():
            self._step_sampler.start(sequence, state)
            self._scheduler.add(sequence)
            self._deadlines.add(sequence)
            ending = self._scheduler.ending(sequence) if sequence.output else None
            if ending is not None:  # an earlier attempt had completed it
                self._scheduler.remove(sequence)
                self._emit(sequence, ending, now)

    def abort(self, request_id: str, choices: Sequence[int] = ()) -> None:
        """End a request, or some of its choices, without any output; frees blocks at once. A beam
        search ends as a whole or not at all.
        """
        if choices and request_id in self._groups:
            return
        for sequence in tuple(self._requests.get(request_id, ())):
            if not choices or sequence.choice in choices:
                self._scheduler.remove(sequence)
                self._forget(sequence, FinishReason.ABORT)

    def drop_adapter(self, key: str) -> None:
        """Forget an adapter; requests that still have it fail."""
        failure = Failure("the adapter of the request was unloaded", "model_not_found", "model")
        for sequences in tuple(self._requests.values()):
            for sequence in tuple(sequences):
                if sequence.request.adapter == key:
                    self._scheduler.remove(sequence)
                    self._fail(sequence, failure, self._clock())
        self.adapters.remove(key)

    @property
    def adapters_in_use(self) -> tuple[str, ...]:
        """Keys of those that requests have. Any thread may ask."""
        return tuple(key for key in tuple(self._adapter_uses) if key)

    def sequences_by_adapter(self) -> tuple[Counter[str], Counter[str]]:
        """Running and waiting sequences by the key of their adapter. Any thread may ask."""
        return self._scheduler.queues.by_adapter()

    def _stop_using(self, adapter: str) -> None:
        self._adapter_uses[adapter] -= 1
        if not self._adapter_uses[adapter]:
            del self._adapter_uses[adapter]

    def has_request(self, request_id: str) -> bool:
        """Whether a choice of this request waits or runs."""
        return request_id in self._requests

    def pause(self, request_id: str, num_tokens: int = 0) -> None:
        """Plan no rows of a request any more, once each of its choices has so many tokens with the
        prompt; it keeps its blocks, unless it is preempted. Unknown ids are ignored.
        """
        if request_id in self._requests:
            self._to_pause[request_id] = num_tokens

    def resume(self, request_id: str) -> None:
        """Plan rows of a paused request again."""
        self._to_pause.pop(request_id, None)
        self._paused.discard(request_id)

    def take_paused(self) -> list[str]:
        """Requests that are paused from now on; none that may be about to run alone."""
        found = []
        for name in self._to_pause.keys() - self._isolation.suspects:
            if min(s.num_tokens for s in self._requests[name]) >= self._to_pause[name]:
                del self._to_pause[name]
                found.append(name)
        self._paused.update(found)
        return found

    def begin_fetch(self, hashes: Sequence[BlockHash], found: Sequence[int]) -> Fetch | None:
        """Get ready for blocks of a prefix that another worker has; see ``KvTransferStore``."""
        return self.kv_store.begin(hashes, found, num_spare=len(self._scheduler.queues.running))

    def take_admissible(self, at_most: int) -> list[tuple[Request, tuple[BlockHash, ...]]]:
        """Requests that fit into the next steps, with the hashes of the full blocks of their
        prompts; each is returned once, and again if it is preempted.
        """
        prefixes, isolation = self._scheduler.prefixes, self._isolation
        if not prefixes.is_enabled or isolation.is_waiting:
            return []
        restriction, size = self._restriction(isolation.alone), prefixes.block_size
        return [
            (sequence.request, tuple(prefixes.hashes(sequence, sequence.prompt_length // size)))
            for sequence in self._scheduler.admission.take_admissible(restriction, at_most)
        ]

    def wait_for_kv(self, request_id: str, num_coming: int) -> None:
        """Do not admit a request before ``kv_came``: so many blocks for it are on their way."""
        self._scheduler.kv_waits.begin(request_id, num_coming)

    def kv_came(self, request_id: str) -> None:
        """Nothing is on its way for a request any more. Unknown ids are ignored."""
        self._scheduler.kv_waits.end(request_id)

    def keep_in(self, tiers: KvTiers, wake: Callable[[], None]) -> TurnCopies:
        """Begin to copy what turns leave into lower tiers; see ``TurnCopies``."""
        copies = TurnCopies(self.kv_store, tiers, wake)
        self._tiers, self._scheduler.prefixes.listener = tiers, copies
        return copies

    def under_pressure(self) -> Request | None:
        """The request that would be preempted first, if that may be soon; else None."""
        if self._intent.restriction.alone is not None:
            return None
        sequence = self._scheduler.preemption.under_pressure()
        return None if sequence is None else sequence.request

    def note_contents(self) -> BlockContents:
        """Begin to note what new cached blocks hold."""
        contents = BlockContents(
            pool=self.pool,
            block_size=self._section.block_size_tokens,
            length_matters_above=self._scheduler.prefixes.length_matters_above,
        )
        self._scheduler.prefixes.contents = self.kv_store.contents = contents
        return contents

    @property
    def has_work(self) -> bool:
        """Whether there are requests, or outputs that ``poll`` would return."""
        return bool(self._requests or self._pending)

    def _check_room(self, request: Request) -> None:
        known = self._requests.get(request.request_id)
        if known and known[0].request.attempt >= request.attempt:
            raise RequestError(f"request {request.request_id} is already here", "request_id")
        if not request.attempt:  # else it was let in once, by a worker that is lost
            waiting = len(self._scheduler.queues.waiting)
            tokens = self._scheduler.admission.num_waiting_tokens
            check_room(request, self._section, waiting, tokens)

    # Steps

    def wanted(self) -> RowsWanted:
        """Rows that the next step could run here."""
        if self._isolation.is_waiting:
            return RowsWanted()
        self._intent = intent = self._scheduler.intent(self._restriction(self._isolation.alone))
        wanted = replace(intent.wanted, edge_share=self.runner.dispatcher.edge_share)
        if not self._traced:
            return wanted
        return replace(wanted, parents=self._traced.parents(intent.sequences))

    def _restriction(self, alone: str | None) -> Restriction:
        return Restriction(self._isolation.suspects | self._paused, alone)

    def poll(self) -> list[TokenOutput]:
        """Outputs that need no step: choices past their deadline, or complete at receipt."""
        now = self._clock()
        self.pool.advance(now)
        for sequence in self._deadlines.late(now):
            self._scheduler.remove(sequence)
            limit = sequence.request.deadline_ms
            self._fail(sequence, Failure(f"not done within {limit} ms", "deadline_exceeded"), now)
        outputs, self._pending = self._pending, []
        return outputs

    @torch.inference_mode()
    def step(self, header: StepHeader) -> list[TokenOutput]:
        """Run what the header grants this rank, and return the outputs, those of ``poll`` included.

        Takes part in the exchanges of a grant also when there is nothing left to run. Raises
        ``TransportError`` with the plan abandoned and all sequences as they were.
        """
        grant = header.grant(self._rank)
        begin = 0.0 if self._speculator is None else self._clock()
        isolation = self._isolation
        # Requests may have been paused or accused since the rows were proposed.
        restriction = self._restriction(isolation.alone if header.is_alone else None)
        self._intent = self._intent.under(restriction)
        plan = self._scheduler.plan(self._intent, grant)
        try:
            self._step_sampler.prepare(plan)
            result = self.runner.run(header, plan)
            tokens = None if result is None else self._step_sampler.draw(plan, result)
            if self._has_predictor and grant.num_rows:
                result = self._predict(plan, result, tokens)
            is_complete = self.runner.dispatcher.end_step()
        except BaseException:
            self._abandon(plan)
            isolation.give_up(plan.request_ids)
            self._counters["steps_abandoned_total"] += 1
            raise
        finally:
            self._note_dispatch(plan)
            if header.parents:
                self._traced.ran(header, self._rank, (r.sequence for r in plan.rows))
        if not is_complete:
            self._abandon(plan)
            self._counters["steps_repeated_total"] += 1
        elif result is not None and tokens is not None:
            self._commit(header.epoch, plan, result, tokens)
            if self._speculator is not None and not header.prefill_rows:
                elsewhere = header.num_decodes - grant.num_decodes
                took_s = self._clock() - begin
                self._speculator.observe_step(header.decode_rows, elsewhere, took_s)
        return self.poll()

    def _predict(
        self, plan: StepPlan, result: StepResult | None, tokens: StepTokens | None
    ) -> StepResult | None:
        """Run the predictor on all rows of a step, for drafts of the next one."""
        drawn = {} if tokens is None else tokens.drawn
        ids = {s: [one.token for one in found] for s, found in drawn.items()}
        first_row = () if result is None else result.first_row
        predicted = self.runner.predict(result, next_tokens(plan, first_row, ids))
        if predicted is None or result is None or tokens is None:
            return result
        speculator = self._speculator
        asked = {s: new for s, new in ids.items() if speculator and speculator.wants_prediction(s)}
        tokens.predicted.update(self._step_sampler.predict(plan, result, predicted.hidden, asked))
        return replace(result, routed=predicted.routed)

    def _abandon(self, plan: StepPlan) -> None:
        """Leave all sequences as they were before the step."""
        # A broken step may have written NaN: the blocks' next holder must not read them.
        self.cache.clear_slots(plan.cache_slots(self.cache.block_size))
        self._scheduler.abandon(plan)

    def _commit(self, epoch: int, plan: StepPlan, result: StepResult, tokens: StepTokens) -> None:
        """Make the step count, and queue its outputs."""
        now = self._clock()
        broken = [s for s, failure in tokens.failed.items() if failure is NOT_FINITE]
        dirty = {block for sequence in broken for block in sequence.blocks}
        self.pool.forget(dirty)
        if self.states is not None:
            for sequence in broken:
                self.states.forget(sequence.block_hashes)
        if self._tiers is not None:
            self._tiers.forget(name for s in broken for name in s.block_hashes)
        new = {
            sequence: tuple(one.token for one in drawn)
            for sequence, drawn in tokens.drawn.items()
            if sequence not in tokens.candidates
        }
        self._clear_rejected(tokens.broken, new)
        endings = self._scheduler.commit(plan, new, tokens.failed.keys())
        # Blocks may hold NaN: their next holder must not read them.
        self.cache.clear([block for block in dirty if self.pool.is_free(block)])
        self.load.add(epoch, plan.num_rows, result.routed)
        self._isolation.commit(plan.request_ids)
        self._counters["steps_total"] += 1
        self._iteration_tokens.observe(plan.num_rows)
        self._counters["generation_tokens_total"] += sum(map(len, new.values()))
        if self._speculator is not None:
            for planned in plan.rows:
                if (own := new.get(planned.sequence)) is not None:
                    self._speculator.commit(planned.sequence, planned.drafts, own)
            for sequence, token in tokens.predicted.items():
                self._speculator.note_prediction(sequence, token)
        for sequence, entries in tokens.scored.items():
            sequence.prompt_logprobs += entries
        for sequence, rows_found in tokens.inspected.items():
            self._step_sampler.inspector.add(sequence, rows_found)
        complete = (s for s in tokens.complete if s not in tokens.candidates)
        for sequence in complete:
            drawn, classes = tokens.drawn.get(sequence, ()), tokens.classes.get(sequence, ())
            self._emit(sequence, endings.get(sequence), now, drawn, classes)
        for sequence, failure in tokens.failed.items():
            self._fail(sequence, failure, now)
        for sequence, candidates in tokens.candidates.items():
            self._take_candidates(sequence, candidates, now)

    def _clear_rejected(
        self, broken: Sequence[PlannedRows], new: Mapping[SequenceState, Sequence[int]]
    ) -> None:
        """Clear what rejected drafts wrote, where it may be NaN: later rows meet it masked."""
        rejected = [
            replace_rows(rows, first=rows.first + kept, count=rows.count - kept)
            for rows in broken
            if (kept := max(len(new.get(rows.sequence, ())), 1)) < rows.count
        ]
        self.cache.clear_slots(StepPlan(tuple(rejected)).cache_slots(self.cache.block_size))

    def _note_dispatch(self, plan: StepPlan) -> None:
        for sequence in self._scheduler.preemption.preempted:
            sequence.note_preemption(self._clock())
        when = self.runner.first_dispatch
        if when is not None:
            for planned in plan.rows:
                planned.sequence.note_dispatch(when)

    # Workers that die

    def generation_runs(self) -> None:
        """Steps of another generation follow; call it after ``worker_died``."""
        self._isolation.begin()

    def worker_died(self) -> None:
        """Another worker of the generation is lost; the request that ran alone then fails."""
        culprit = self._isolation.die()
        for sequence in tuple(self._requests[culprit]) if culprit is not None else ():
            self._scheduler.remove(sequence)
            self._fail(sequence, _POISONOUS, self._clock())

    def take_solo_steps(self) -> list[SoloStep | Queued]:
        """Stages of solo steps to report to gateways; see ``Isolation``."""
        return self._isolation.advance(self._could_run_alone, self._attempt, self._clock())

    def acknowledge_solo_step(self, solo_step: SoloStep) -> None:
        """A gateway has recorded a stage of a solo step."""
        self._isolation.acknowledge(solo_step)

    def end_solo_step(self) -> None:
        """The gateway of the solo step has gone."""
        self._isolation.disconnect()

    def _could_run_alone(self, request_id: str) -> bool:
        wanted = self._scheduler.intent(self._restriction(request_id)).wanted
        return bool(wanted.decode_rows or wanted.prefill_rows)

    def _attempt(self, request_id: str) -> int:
        return self._requests[request_id][0].request.attempt

    # Outputs

    def _emit(
        self,
        sequence: SequenceState,
        ending: Ending | None,
        now: float,
        drawn: Sequence[SampledToken] = (),
        classes: tuple[float, ...] = (),
    ) -> None:
        new = tuple(one.token for one in drawn)
        logprobs = tuple(one.logprob for one in drawn if one.logprob is not None)
        arrays = self._step_sampler.inspector.arrays(sequence) if ending else ()
        self._pending.append(sequence.take_output(now, ending, new, logprobs, classes, arrays))
        if ending is not None:
            self._forget(sequence, ending.reason)

    def _fail(self, sequence: SequenceState, failure: Failure, now: float) -> None:
        if sequence.params.beams is not None:
            self._fail_beams(sequence, failure, now)
            return
        self._pending.append(sequence.error(failure, now))
        self._forget(sequence, FinishReason.ERROR)

    def _take_candidates(
        self, sequence: SequenceState, candidates: Sequence[TokenLogprob], now: float
    ) -> None:
        """What may follow a beam is known: its search goes on once it is for all of them."""
        group = self._groups.get(sequence.request.request_id)
        if group is None:
            return  # another beam has failed
        group.take(sequence, candidates)
        if not group.is_complete:
            return
        step = group.advance(now)
        for beam in step.ended:
            self._scheduler.remove(beam, has_ended=group.search.is_over)
        copied = [self._fork(parent, child) for parent, child in step.forks]
        self.cache.copy_blocks([pair for pair in copied if pair is not None])
        if group.search.is_over:
            self._end_beams(group, group.outputs(now, self._eos))
        for beam in step.ended:
            self._drop(beam)

    def _fork(self, parent: SequenceState, child: SequenceState) -> tuple[int, int] | None:
        """Add a beam that begins where another one is."""
        self._requests[child.request.request_id].append(child)
        self._step_sampler.start(child, None)
        self._deadlines.add(child)
        return self._scheduler.fork(parent, child)

    def _end_beams(self, group: BeamGroup, outputs: Sequence[TokenOutput]) -> None:
        """The last outputs of a request that searches; its sequences are dropped by the caller."""
        self._pending += outputs
        self._counters["generation_tokens_total"] += sum(len(o.token_ids) for o in outputs)
        self._ended.update(Counter(o.finish_reason for o in outputs if o.finish_reason))
        del self._groups[group.request.request_id]

    def _fail_beams(self, sequence: SequenceState, failure: Failure, now: float) -> None:
        """None of the outputs can be found without this beam."""
        group = self._groups.get(sequence.request.request_id)
        if group is None:
            return  # with another beam
        error = sequence.error(failure, now)
        choices = range(group.request.n)
        self._end_beams(group, [replace_rows(error, choice=place, index=0) for place in choices])
        for beam in tuple(self._requests[group.request.request_id]):
            self._scheduler.remove(beam)
            self._drop(beam)

    def _forget(self, sequence: SequenceState, reason: FinishReason) -> None:
        self._ended[reason] += 1
        self._drop(sequence)

    def _drop(self, sequence: SequenceState) -> None:
        self._step_sampler.end(sequence)
        if self._speculator is not None:
            self._speculator.forget(sequence)
        request_id = sequence.request.request_id
        left = self._requests[request_id]
        left.remove(sequence)
        if not left:
            del self._requests[request_id]
            self._groups.pop(request_id, None)
            self._stop_using(sequence.request.adapter)
            self._traced.forget(request_id)
            self._scheduler.kv_waits.forget(request_id)
            self._isolation.forget(request_id)
            self.resume(request_id)

    # Numbers

    def stats(self) -> dict[str, float]:
        """Gauges and counters by metric name without prefix. Any thread may call it."""
        free, total = self.pool.num_free, self.pool.num_blocks
        scheduler, admission = self._scheduler, self._scheduler.admission
        prefixes, waiting = scheduler.prefixes, len(scheduler.queues.waiting)
        deferred, for_kv = admission.num_deferred, admission.num_waiting_for_kv
        others = max(waiting - deferred - for_kv, 0)
        return {
            "num_requests_running": float(len(scheduler.queues.running)),
            "num_requests_waiting": float(waiting),
            'num_requests_waiting_by_reason{reason="capacity"}': float(others),
            'num_requests_waiting_by_reason{reason="deferred"}': float(deferred),
            'num_requests_waiting_by_reason{reason="kv"}': float(for_kv),
            **self._iteration_tokens.stats("iteration_tokens_total"),
            "kv_cache_usage_perc": 1 - free / total,
            "kv_blocks_free": float(free),
            "kv_blocks_total": float(total),
            "kv_blocks_kept": float(self.pool.num_kept),
            **self._state_stats(),
            **({} if self._speculator is None else self._speculator.stats()),
            "num_preemptions_total": float(scheduler.preemption.num_preemptions),
            "prefix_cache_queries_total": float(prefixes.num_queried_tokens),
            "prefix_cache_hits_total": float(prefixes.num_hit_tokens),
            "prompt_tokens_cached_total": float(prefixes.num_cached_prompt_tokens),
            **{name: float(count) for name, count in self._counters.items()},
            **{f"choices_{r.value}_total": float(n) for r, n in self._ended.items()},
        }

    def _state_stats(self) -> dict[str, float]:
        states = self.states
        if states is None:
            return {}
        return {
            "recurrent_states_free": float(states.num_free),
            "recurrent_states_total": float(states.num_slots),
        }

    def check_integrity(self) -> None:
        """Assert that block accounting is exact; for tests."""
        self._scheduler.check_integrity(self.kv_store.tables)


def _speculator(
    config: ModelConfig, section: SpeculationSection, max_model_len: int
) -> Speculator | None:
    """None where nothing guesses. Raises ``ConfigError`` for a model without a way back."""
    if not section.is_on:
        return None
    rule = "must be none: the model has recurrent states, which rejected tokens would change"
    check(config.delta_net is None, "speculative_method", section.speculative_method, rule)
    return Speculator(section, max_model_len, config.eos_token_ids)


def _state_slots(config: ModelConfig, section: EngineSection) -> StateSlots | None:
    if config.delta_net is None:
        return None
    return StateSlots(section.num_states, section.max_num_seqs)
