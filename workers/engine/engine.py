"""The engine of one attention worker: its requests, their KV blocks, and steps with their rows.

Only one thread may use the engine; other threads may read ``stats`` and the number of blocks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch

from cluster.config.cluster import EngineSection
from cluster.config.lora import LoraSection
from cluster.config.speculation import SpeculationSection
from cluster.core.checks import check
from cluster.core.errors import TransportError
from workers.dispatch.dispatcher import CapturableDispatcher, TokenDispatcher
from workers.engine.decode_graphs import DecodeGraphs
from workers.engine.engine_requests import EngineRequests
from workers.engine.engine_stats import EngineStats
from workers.engine.expert_load import LoadCounter
from workers.engine.kv_memory import KvMemory
from workers.engine.model_runner import ModelRunner
from workers.engine.request_checks import RequestLimits
from workers.engine.step_runner import StepRunner
from workers.engine.step_sampler import StepSampler
from workers.kv.contents import BlockContents
from workers.kv.tiers.tiers import KvTiers
from workers.kv.transfer.store import Fetch
from workers.kv.transfer.turn_copier import TurnCopier
from workers.lora.loaded import LoadedAdapters
from workers.model.compute_threads import ComputeThreads
from workers.model.config import BankSpec, ModelConfig
from workers.model.layers import AttentionModel
from workers.model.side_stream import SideStream
from workers.native.thread_team import ThreadTeam
from workers.requests.block_hash import BlockHash
from workers.requests.buckets import buckets_up_to
from workers.requests.request import (
    Request,
    TokenOutput,
)
from workers.requests.step_header import StepHeader
from workers.sampling.grammar import CompiledGrammar
from workers.scheduling.scheduler import Scheduler
from workers.scheduling.step_plan import RowsWanted
from workers.speculation.speculator import Speculator


class Engine:
    """Runs the requests of one attention worker, one step at a time."""

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
        team: ThreadTeam | None = None,
        clock: Callable[[], float] = time.monotonic,
        is_exact: bool = False,
        lora: LoraSection | None = None,
    ) -> None:
        """Allocate the KV cache on the model's device. Raises ``ConfigError``.

        ``is_exact``: the results of a row have the same bits regardless of other rows.
        ``max_model_len``: context limit, with which ``model`` must have been loaded too; None: the
        limit of the checkpoint. ``team``: native sampling threads; None: torch samples.
        """
        self._section = section
        self._has_predictor = config.has_predictor
        self._rank = rank
        self._clock = clock
        self.max_model_len = max_model_len or config.context_tokens
        """Context limit in tokens."""
        self._memory = memory = KvMemory(
            model, config, section, self.max_model_len, compute_threads or ComputeThreads()
        )
        self.states, self.cache, self.pool = memory.states, memory.cache, memory.pool
        self.kv_store = memory.store
        speculation = speculation or SpeculationSection()
        self._speculator = _speculator(config, speculation, self.max_model_len)
        self._max_decode_rows = section.max_num_seqs + speculation.max_draft_rows
        self._scheduler = _scheduler(
            config, section, self.max_model_len, memory, self._speculator, speculation
        )
        self.adapters = LoadedAdapters(model, lora or LoraSection())
        """Loaded LoRA adapters, which requests may name."""
        self.runner = ModelRunner(
            model=model,
            adapters=self.adapters,
            cache=self.cache,
            tables=self._scheduler.tables,
            banks=banks,
            dispatcher=dispatcher,
            rank=rank,
        )
        self._step_sampler = StepSampler(config, banks, model.head, is_exact, team)
        self._stats = EngineStats(self._scheduler, self.pool, self.states, self._speculator)
        self.requests = EngineRequests(
            scheduler=self._scheduler,
            sampler=self._step_sampler,
            speculator=self._speculator,
            memory=memory,
            adapters=self.adapters,
            stats=self._stats,
            section=section,
            limits=RequestLimits.of(config, section, self.max_model_len, self.pool.num_blocks),
            pad_token_id=config.pad_token_id,
            clock=clock,
        )
        self.load = LoadCounter(banks, SideStream(model.device))
        """Counter of the rows of committed steps by chosen expert and expert copy."""
        self.steps = StepRunner(
            scheduler=self._scheduler,
            model=self.runner,
            sampler=self._step_sampler,
            requests=self.requests,
            memory=memory,
            load=self.load,
            stats=self._stats,
            speculator=self._speculator,
            has_predictor=config.has_predictor,
            rank=rank,
            clock=clock,
        )
        """Runs the steps."""
        self.set_dispatcher(dispatcher)

    def set_dispatcher(self, dispatcher: TokenDispatcher) -> None:
        """Send rows to the experts through ``dispatcher``. The engine must have no requests."""
        assert not self.has_work
        self.settle()
        tables, runner = self._scheduler.tables, self.runner
        tables.forget_changes()
        runner.dispatcher, runner.graphs = dispatcher, None
        is_eager = self._section.enforce_eager or self.states is not None or self._has_predictor
        if is_eager or not self.cache.is_read_in_place:
            return
        if isinstance(dispatcher, CapturableDispatcher):
            runner.graphs = DecodeGraphs(
                runner.compute,
                lambda: id(runner.model),
                dispatcher,
                self.cache,
                tables,
                [bank.top_k for bank in runner.banks],
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

        ``grammar`` is the compiled grammar of the request; ``hashes`` are known hashes of the first
        full blocks of the prompt. A newer attempt of a known request replaces the older one. Raises
        ``RequestError`` for a request that can never run and ``QueueFullError`` if the queue is
        full, without a change of state.
        """
        self.requests.add(request, received, grammar, hashes)

    def abort(self, request_id: str, choices: Sequence[int] = ()) -> None:
        """End a request, or some of its choices, without output, and free the blocks. No effect on
        an unknown id, or on single ``choices`` of a beam search. Empty ``choices``: all of them.
        """
        self.requests.abort(request_id, choices)

    def begin_fetch(self, hashes: Sequence[BlockHash], cached: Sequence[int]) -> Fetch | None:
        """Prepare to fetch a prefix's blocks; see ``KvTransferStore.begin``, also for None."""
        return self.kv_store.begin(hashes, cached, num_spare=len(self._scheduler.queues.running))

    def take_admissible(self, at_most: int) -> list[tuple[Request, tuple[BlockHash, ...]]]:
        """Return up to ``at_most`` waiting requests that can run soon, with the hashes of their
        full prompt blocks. A request is returned once, and once more after each preemption.
        """
        prefixes, isolation = self._scheduler.prefixes, self.requests.isolation
        if not prefixes.is_enabled or isolation.is_waiting:
            return []
        restriction, size = self.requests.restriction(isolation.alone), prefixes.block_size
        return [
            (sequence.request, tuple(prefixes.hashes(sequence, sequence.prompt_length // size)))
            for sequence in self._scheduler.take_admissible(restriction, at_most)
        ]

    def wait_for_kv(self, request_id: str, num_coming: int) -> None:
        """Keep a request waiting until ``end_kv_wait``, while ``num_coming`` blocks are fetched."""
        self._scheduler.kv_waits.begin(request_id, num_coming)

    def end_kv_wait(self, request_id: str) -> None:
        """End the wait of a request for KV blocks; it may now run. Unknown ids are ignored."""
        self._scheduler.kv_waits.end(request_id)

    def start_tier_copies(self, tiers: KvTiers, wake: Callable[[], None]) -> TurnCopier:
        """Start to copy the KV blocks of requests to host memory or disk; see ``TurnCopier``."""
        copies = TurnCopier(self.kv_store, tiers, wake)
        self._memory.tiers, self._scheduler.prefixes.listener = tiers, copies
        return copies

    def preemption_candidate(self) -> Request | None:
        """Return the request to preempt next, if a preemption is likely soon; else None."""
        if self.steps.intent.restriction.solo_request is not None:
            return None
        sequence = self._scheduler.preemption.candidate()
        return None if sequence is None else sequence.request

    def start_recording_contents(self) -> BlockContents:
        """Start to record the tokens that new blocks of the prefix cache contain."""
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
        return not self.requests.is_idle

    # Steps

    def rows_wanted(self) -> RowsWanted:
        """Return the rows that this worker could run in the next step, to propose to the leader."""
        return self.steps.rows_wanted()

    def poll(self) -> list[TokenOutput]:
        """Return outputs queued since the last call, among them errors of expired choices."""
        if not self.requests.may_all_run:
            self.settle()  # a paused request has no output after it is reported as paused
        now = self._clock()
        self.pool.advance(now)
        self.requests.fail_late(now)
        return self.requests.take_outputs()

    @torch.inference_mode()
    def step(self, header: StepHeader) -> list[TokenOutput]:
        """Run the rows that the header grants this rank; return all outputs queued until the end.

        The outputs may be those of the step before; see ``StepRunner``. A rank with fewer rows than
        granted, or none, still takes part in all exchanges with the experts. Raises
        ``TransportError`` if the step fails; then no sequence has a new token.
        """
        self.steps.run(header)
        return self.poll()

    def settle(self) -> None:
        """Commit a step that was launched but not read; ``poll`` returns its outputs. If messages
        of the step are lost, undo it."""
        with suppress(TransportError):
            self.steps.settle()

    # Statistics

    def stats(self) -> dict[str, float]:
        """Return the engine's metrics by name without prefix. Any thread may call this method."""
        return self._stats.read()

    def check_integrity(self) -> None:
        """Assert that the block pool and the sequences agree on all blocks in use; for tests."""
        self._scheduler.check_integrity(self.kv_store.tables)


def _speculator(
    config: ModelConfig, section: SpeculationSection, max_model_len: int
) -> Speculator | None:
    """Return the speculator, or None if speculative decoding is off.

    Raises ``ConfigError`` for a model with recurrent states.
    """
    if not section.is_on:
        return None
    rule = "must be none: the model has recurrent states, which rejected tokens would change"
    check(config.delta_net is None, "speculative_method", section.speculative_method, rule)
    return Speculator(section, max_model_len, config.eos_token_ids)


def _scheduler(
    config: ModelConfig,
    section: EngineSection,
    max_model_len: int,
    memory: KvMemory,
    speculator: Speculator | None,
    speculation: SpeculationSection,
) -> Scheduler:
    return Scheduler(
        memory.pool,
        block_size=section.block_size_tokens,
        max_num_seqs=section.max_num_seqs,
        max_num_batched_tokens=section.step_tokens,
        max_model_len=max_model_len,
        eos_token_ids=config.eos_token_ids,
        enable_prefix_caching=section.enable_prefix_caching,
        length_matters_above=config.length_matters_above,
        states=memory.states,
        speculator=speculator,
        max_draft_rows=speculation.max_draft_rows,
    )
