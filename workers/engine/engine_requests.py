"""The requests of an engine, from arrival to their last outputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from itertools import chain

from cluster.config.cluster import EngineSection
from cluster.core.errors import ModelNotFoundError, RequestError
from workers.beams.group import BeamStep
from workers.beams.searches import BeamSearches
from workers.engine.active_requests import ActiveRequests
from workers.engine.choices import open_choices
from workers.engine.deadlines import Deadlines
from workers.engine.engine_stats import EngineStats
from workers.engine.isolation import Isolation
from workers.engine.kv_memory import KvMemory
from workers.engine.paused_requests import PausedRequests
from workers.engine.request_checks import RequestLimits, check_queue_limits, check_request
from workers.engine.step_sampler import StepSampler, StepTokens
from workers.lora.loaded import LoadedAdapters
from workers.metrics.traced_steps import TracedRequests
from workers.requests.block_hash import BlockHash
from workers.requests.classifier import cut_after_pooled
from workers.requests.request import FinishReason, Queued, Request, SoloStep, TokenOutput
from workers.requests.sequence import Ending, Failure, SequenceState
from workers.sampling.grammar import CompiledGrammar
from workers.sampling.sampler import SampledToken
from workers.scheduling.scheduler import Scheduler
from workers.scheduling.step_intent import Restriction
from workers.speculation.speculator import Speculator

_POISONOUS = Failure(
    "a third worker in a row was lost with this request, which was alone in its step",
    "poisonous_request",
)
"""Error of a request that probably crashes workers: a worker died while only this request ran."""

_LATE = Failure("the request's deadline has passed", "deadline_exceeded")
"""Error of a late request. It states no time: ``Request.deadline_ms`` is what was left of the
client's limit when the request was sent to this worker."""


class EngineRequests:
    """Adds requests to the engine, ends them, and queues their outputs."""

    def __init__(
        self,
        *,
        scheduler: Scheduler,
        sampler: StepSampler,
        speculator: Speculator | None,
        memory: KvMemory,
        adapters: LoadedAdapters,
        stats: EngineStats,
        section: EngineSection,
        limits: RequestLimits,
        pad_token_id: int | None,
        clock: Callable[[], float],
    ) -> None:
        self._scheduler = scheduler
        self._sampler = sampler
        self._speculator = speculator
        self._memory = memory
        self._adapters = adapters
        self._stats = stats
        self._section = section
        self._limits = limits
        self._pad = pad_token_id
        self._clock = clock
        self._active = ActiveRequests()
        self._searches = BeamSearches(limits.eos_token_ids)
        self._deadlines = Deadlines()
        self._paused = PausedRequests()
        self._outputs: list[TokenOutput] = []
        self.isolation = Isolation()
        """Counts the worker deaths of each request, and decides which request runs alone."""
        self.traced = TracedRequests()
        """Requests that are sampled for tracing, so that their steps have spans."""

    def __contains__(self, request_id: str) -> bool:
        """Whether a choice of this request waits or runs."""
        return request_id in self._active

    @property
    def is_idle(self) -> bool:
        """Whether the engine has no requests and no outputs that ``take_outputs`` would return."""
        return not (self._active or self._outputs)

    @property
    def adapters_in_use(self) -> tuple[str, ...]:
        """Keys of the LoRA adapters that requests use. Any thread may read this property."""
        return self._active.adapters

    def sequences_by_adapter(self) -> tuple[Counter[str], Counter[str]]:
        """Numbers of running and of waiting sequences by LoRA adapter key.

        Any thread may call this method.
        """
        return self._scheduler.queues.by_adapter()

    def restriction(self, alone: str | None) -> Restriction:
        """Return which requests may run: all except suspects of crashes and paused requests.

        ``alone``: id of the only request that may run, even a suspect or paused one; None: no
        limit.
        """
        return Restriction(self.isolation.suspects | self._paused.request_ids, alone)

    @property
    def may_all_run(self) -> bool:
        """Whether no request is paused, to be paused, or a suspect of crashes."""
        return not self._paused and not self.isolation.suspects

    # Arrival

    def add(
        self,
        request: Request,
        received: float | None,
        grammar: CompiledGrammar | None,
        hashes: Sequence[BlockHash],
    ) -> None:
        """Queue a request; parameters and errors are as in ``Engine.add_request``."""
        check_request(request, self._limits)
        if self._limits.is_classifier and request.inspection is None:
            request, whole = cut_after_pooled(request, self._pad), request
            hashes = hashes if request is whole else ()
        self._check(request)
        now = self._clock() if received is None else received
        grammars = open_choices(request, grammar, self._active.num_received, now)
        first, *_ = grammars
        first.block_hashes += hashes  # other choices copy them from the first
        self.abort(request.request_id)
        self._active.add_request(request, tuple(grammars))
        self._searches.start(first)
        self.isolation.enter(request.request_id, request.num_deaths)
        if request.pauses:
            num_tokens = self._active.num_tokens(request.request_id)
            self._paused.request_pause(request.request_id, num_tokens + 1)
        self.traced.add(request)
        self._stats.count("prompt_tokens_total", len(request.prompt))
        for sequence, state in grammars.items():
            self._sampler.start(sequence, state)
            self._scheduler.add(sequence)
            self._deadlines.add(sequence)
            ending = self._scheduler.ending(sequence) if sequence.output else None
            if ending is not None:  # an earlier attempt completed it
                self._scheduler.remove(sequence)
                self._emit(sequence, ending, now)

    def _check(self, request: Request) -> None:
        """Check that the engine can serve a request now.

        Raises ``RequestError``, and ``QueueFullError`` if the queue is full.
        """
        if request.adapter and request.adapter not in self._adapters:
            raise ModelNotFoundError("the adapter of the request is no longer loaded")
        self._sampler.inspector.check(request)
        if self._active.attempt(request.request_id) >= request.attempt:
            raise RequestError(f"request {request.request_id} is already here", "request_id")
        if not request.attempt:  # a later attempt was admitted before, by a worker that was lost
            queues = self._scheduler.queues
            waiting, tokens = len(queues.waiting), queues.num_waiting_tokens
            check_queue_limits(request, self._section, waiting, tokens)

    # Pauses and deaths of workers

    def pause(self, request_id: str, num_tokens: int = 0) -> None:
        """Pause a request once each of its choices has ``num_tokens`` tokens, including the prompt.

        A paused request runs no rows. It keeps its blocks unless it is preempted. Unknown ids are
        ignored.
        """
        if request_id in self._active:
            self._paused.request_pause(request_id, num_tokens)

    def resume(self, request_id: str) -> None:
        """Resume a request that is paused or is to be paused."""
        self._paused.forget(request_id)

    @property
    def paused(self) -> Set[str]:
        """Ids of the paused requests."""
        return self._paused.request_ids

    def block_hashes(self, request_id: str) -> list[list[BlockHash]]:
        """Return the hashes of the full, computed blocks of each choice of a request."""
        prefixes = self._scheduler.prefixes
        return [
            prefixes.hashes(own, own.num_computed // prefixes.block_size)
            for own in self._active.sequences(request_id)
        ]

    def take_paused(self) -> list[str]:
        """Pause the requests that have reached their number of tokens, and return their ids.

        Suspects of crashes, which may have to run alone, are not paused.
        """
        return self._paused.take_paused(self._active.num_tokens, self.isolation.suspects)

    def record_worker_death(self) -> None:
        """Record that another worker was lost. A request that ran alone in the lost step fails."""
        culprit = self.isolation.record_death()
        if culprit is not None:
            self._fail_all(self._active.sequences(culprit), _POISONOUS, self._clock())

    def take_solo_steps(self) -> list[SoloStep | Queued]:
        """Return the messages about solo steps (with rows of only one request) to send to gateways.

        The call may offer a new solo step or withdraw an old offer; see ``Isolation.advance``.
        """
        attempt, now = self._active.attempt, self._clock()
        return self.isolation.advance(self._could_run_alone, attempt, now)

    def _could_run_alone(self, request_id: str) -> bool:
        rows = self._scheduler.intent(self.restriction(request_id)).wanted
        return bool(rows.decode_rows or rows.prefill_rows)

    # Completion and outputs

    def abort(self, request_id: str, choices: Sequence[int] = ()) -> None:
        """End a request, or some of its choices, without output; see ``Engine.abort``."""
        if choices and request_id in self._searches:
            return
        for sequence in self._active.sequences(request_id):
            if not choices or sequence.choice in choices:
                self._scheduler.remove(sequence)
                self._end(sequence, FinishReason.ABORT)

    def drop_adapter(self, key: str) -> None:
        """Unload the LoRA adapter ``key``; requests that still use the adapter fail."""
        failure = Failure("the adapter of the request was unloaded", "model_not_found", "model")
        sequences = chain(*map(self._active.sequences, self._active))
        self._fail_all([s for s in sequences if s.request.adapter == key], failure, self._clock())
        self._adapters.remove(key)

    def fail_late(self, now: float) -> None:
        """End choices that are past their deadline with an error. ``now``: monotonic time."""
        for sequence in self._deadlines.take_late(now):
            self._fail_all([sequence], _LATE, now)

    def emit_step(
        self, tokens: StepTokens, endings: Mapping[SequenceState, Ending], now: float
    ) -> None:
        """Queue the outputs of a committed step, and advance beam searches.

        ``endings``: sequences that the step has ended, with reasons.
        """
        for sequence in (s for s in tokens.complete if s not in tokens.candidates):
            drawn, classes = tokens.drawn.get(sequence, ()), tokens.classes.get(sequence, ())
            self._emit(sequence, endings.get(sequence), now, drawn, classes)
        for sequence, failure in tokens.failed.items():
            self._fail(sequence, failure, now)
        for sequence, candidates in tokens.candidates.items():
            if (step := self._searches.advance(sequence, candidates, now)) is not None:
                self._apply_beam_step(step)

    def take_outputs(self) -> list[TokenOutput]:
        """Return the outputs queued since the last call."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def _emit(
        self,
        sequence: SequenceState,
        ending: Ending | None,
        now: float,
        drawn: Sequence[SampledToken] = (),
        classes: tuple[float, ...] = (),
    ) -> None:
        new = tuple([one.token for one in drawn])  # faster than a generator
        logprobs = tuple([one.logprob for one in drawn if one.logprob is not None])
        arrays = self._sampler.inspector.arrays(sequence) if ending else ()
        self._outputs.append(sequence.make_output(now, ending, new, logprobs, classes, arrays))
        if ending is not None:
            self._end(sequence, ending.reason)

    def _fail_all(self, sequences: Collection[SequenceState], failure: Failure, now: float) -> None:
        for sequence in sequences:
            self._scheduler.remove(sequence)
            self._fail(sequence, failure, now)

    def _fail(self, sequence: SequenceState, failure: Failure, now: float) -> None:
        """Queue the error of a sequence that the scheduler has removed.

        If the sequence is a beam, the whole search ends.
        """
        if sequence.params.beams is None:
            self._outputs.append(sequence.make_error(failure, now))
            self._end(sequence, FinishReason.ERROR)
        elif outputs := self._searches.fail(sequence, failure, now):
            self._end_search(outputs)
            for beam in self._active.sequences(sequence.request.request_id):
                self._scheduler.remove(beam)
                self._forget(beam)

    def _apply_beam_step(self, step: BeamStep) -> None:
        """Apply a step of a beam search: end beams, add forked beams, and queue outputs."""
        for beam in step.ended:
            self._scheduler.remove(beam, has_ended=step.is_over)
        copied = [self._fork(parent, child) for parent, child in step.forks]
        self._memory.cache.copy_blocks([pair for pair in copied if pair is not None])
        self._end_search(step.outputs)
        for beam in step.ended:
            self._forget(beam)

    def _fork(self, parent: SequenceState, child: SequenceState) -> tuple[int, int] | None:
        """Add the beam ``child``, which continues from the tokens of ``parent``.

        Returns the (source, destination) KV blocks to copy, or None.
        """
        self._active.add_sequence(child)
        self._sampler.start(child, None)
        self._deadlines.add(child)
        return self._scheduler.fork(parent, child)

    def _end_search(self, outputs: Sequence[TokenOutput]) -> None:
        self._outputs += outputs
        self._stats.count("generation_tokens_total", sum(len(o.token_ids) for o in outputs))
        self._stats.count_ends(o.finish_reason for o in outputs if o.finish_reason)

    def _end(self, sequence: SequenceState, reason: FinishReason) -> None:
        self._stats.count_ends([reason])
        self._forget(sequence)

    def _forget(self, sequence: SequenceState) -> None:
        self._sampler.end(sequence)
        if self._speculator is not None:
            self._speculator.forget(sequence)
        if self._active.remove_sequence(sequence):
            request_id = sequence.request.request_id
            self._searches.forget(request_id)
            self.traced.forget(request_id)
            self._scheduler.kv_waits.forget(request_id)
            self.isolation.forget(request_id)
            self._paused.forget(request_id)
