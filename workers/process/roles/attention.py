"""The attention role: requests, KV cache, scheduler, and the model without its experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from cluster.core.placement import ExpertPlacement
from cluster.core.topology import Generation
from workers.dispatch.dispatcher import TokenDispatcher
from workers.engine.engine import Engine
from workers.kv.block_pool import HashChanges
from workers.kv.transfer.block_provider import KvBlockProvider
from workers.metrics.step_timer import StepTimer
from workers.process.context import WorkerContext
from workers.process.intake.adapters import AdapterIntake
from workers.process.intake.commands import (
    AddRequest,
    CopyRequested,
    GatewayCommand,
    GatewayDisconnected,
    PrefetchRequested,
)
from workers.process.intake.copy_receiver import CopyReceiver
from workers.process.intake.grammar_compilations import GrammarCompilations
from workers.process.intake.kv_fetches import KvFetches
from workers.process.intake.lower_tiers import LowerTiers, open_tiers
from workers.process.intake.request_intake import RequestIntake
from workers.process.kv_identity import kv_identity, model_identity, needed_ranks
from workers.process.kv_publisher import KvPublisher
from workers.process.roles.attention_listeners import AttentionListeners
from workers.process.roles.engine_steps import EngineSteps
from workers.process.roles.gateway_outputs import GatewayOutputs
from workers.requests.request import SoloStep, TokenOutput
from workers.requests.wire import Abort, Pause
from workers.sampling.grammar_compiler import GrammarCompiler


class AttentionRole:
    """Serves requests: alternates between gateway commands, waiting requests and steps."""

    def __init__(
        self,
        context: WorkerContext,
        listeners: AttentionListeners,
        engine: Engine,
        dispatcher: TokenDispatcher,
        grammars: GrammarCompiler,
        timer: StepTimer,
    ) -> None:
        section, wake = context.config.engine, context.connections.wake
        self.engine = engine
        self._context = context
        self._dispatcher = dispatcher
        self.inbox = listeners.inbox
        """Queue of gateway commands."""
        self._stream = listeners.stream
        limit_s = section.kv_fetch_limit_s if section.enable_prefix_caching else 0.0
        self.fetches = KvFetches(engine, context.kv_peer, wake, limit_s)
        context.cleanup.callback(self.fetches.close)
        self.tiers = _open_lower_tiers(context, engine, self.fetches)
        """Lower tiers in host memory and on disk; None without tiers."""
        self.copy_receiver = _open_copy_receiver(context, engine, self.tiers)
        """Keeps copies of other workers' blocks; None if session copies are off."""
        lower = None if self.tiers is None else self.tiers.tiers
        self._kv_provider = KvBlockProvider(engine.kv_store, wake, tiers=lower)
        listeners.kv_server.start(self._kv_provider)
        self.adapters = AdapterIntake(engine, wake)
        context.cleanup.callback(self.adapters.close)
        self._publish_contents = _open_kv_publisher(context, engine, lambda: self.adapters.names)
        compilations = GrammarCompilations(grammars.compile, wake)
        context.cleanup.callback(compilations.close)
        self.outputs = GatewayOutputs(engine, self._stream)
        self.intake = RequestIntake(
            engine,
            self.outputs,
            grammars,
            compilations,
            self.fetches,
            [self.fetches] if self.tiers is None else [self.tiers.restores, self.fetches],
            lambda: self.tiers is not None or self._has_peers(),
        )
        self._steps = EngineSteps(
            context, engine, self._stream, timer, self.intake.wait_s, lambda: self.fetches.cost
        )
        engine.runner.on_compute = self._stream.release
        listeners.set_capacity(engine, keeps_copies=self.copy_receiver is not None)

    def enter(self, generation: Generation, placement: ExpertPlacement) -> None:
        """Apply the placement of a new generation with open connections, or of a new epoch."""
        context = self._context
        self.engine.settle()  # a step of the last generation has lost its messages
        context.model.exactness.apply_agreement(generation.agreement)
        self._dispatcher.set_placement(placement, generation)
        if self.tiers is not None:
            how = (context.model.quantize, context.model.dtype), self.engine.cache
            self.tiers.tiers.use(kv_identity(context.me, context.config, generation, *how))

    def lose_members(self) -> None:
        """Handle the death of members of the last generation; its steps have stopped."""
        self.engine.settle()  # an undone step counts against its requests
        self.engine.requests.record_worker_death()

    def begin_steps(self, generation: int) -> None:
        """Accept the streams of gateways: the steps of this generation start."""
        self.engine.requests.isolation.begin_generation()
        self._steps.begin()
        self._stream.admit_streams(generation)

    def between_steps(self) -> None:
        """Handle the gateways' commands, and send messages that need no step."""
        self._kv_provider.serve_requests()
        for command in self.inbox.take():
            self._handle(command)
        if self.tiers is not None:
            self.tiers.copies.advance()
        self.intake.advance()
        self.outputs.publish_prefetched(self.fetches.take_prefetched())
        if (kept := self.adapters.advance()) is not None:
            self._context.send(kept)
        self._emit(self.engine.poll())
        self.outputs.solo_steps.report(self.outputs.owners)
        self._offer_blocks()
        if not self._context.membership.is_running:
            self._stream.release()

    def _offer_blocks(self) -> None:
        """Offer the blocks of paused requests to the workers to which they will move."""
        requests, offers = self.engine.requests, self._kv_provider.offers
        offers.keep_only(requests.paused)
        for request_id in self.outputs.report_paused():
            offers.put(request_id, requests.block_hashes(request_id))

    def run_step(self) -> None:
        """Wait for a step and run it; return without one if the thread is woken."""
        self._steps.run(self._end_step)

    def _end_step(self, outputs: list[TokenOutput]) -> None:
        self._emit(outputs)
        if self._has_peers():
            self.outputs.report_kv_pressure()

    def _has_peers(self) -> bool:
        return len(self._context.membership.generation.attention) > 1

    def _handle(self, command: GatewayCommand) -> None:
        match command:
            case AddRequest():
                self.intake.receive(command)
            case PrefetchRequested():
                self.fetches.prefetch(command)
            case CopyRequested():
                if self.copy_receiver is not None:
                    self.copy_receiver.put(command.message)
            case GatewayDisconnected():
                self.intake.drop_gateway(command.gateway)
                self.outputs.drop_gateway(command.gateway)
            case _:
                self._handle_message(command.gateway, command.message)

    def _handle_message(self, gateway: str, message: Abort | Pause | SoloStep) -> None:
        if isinstance(message, Abort):
            self.intake.abort(gateway, message)
        elif isinstance(message, SoloStep):
            self.outputs.solo_steps.acknowledge(gateway, message)
        elif self.outputs.owners.get(message.request_id) != gateway:
            return  # the engine does not have the request
        elif message.is_cancelled:
            self.engine.requests.resume(message.request_id)
        else:
            self.engine.requests.pause(message.request_id, message.num_tokens)

    def _emit(self, outputs: list[TokenOutput]) -> None:
        """Send each gateway the outputs of its requests, and all gateways the changed KV blocks."""
        if self._context.config.engine.enable_prefix_caching:
            changes = self.engine.pool.take_changes()
            held = changes if self.tiers is None else self.tiers.changes(changes, self.engine)
            self.outputs.publish_kv(held, self.fetches.fetch_cost)
            self._publish_contents(changes)
        self.outputs.emit(outputs)

    # Statistics: control thread

    def stats(self) -> dict[str, float]:
        """Gauges and counters for heartbeats."""
        stats = {**self.engine.stats(), **self.fetches.stats()}
        if self.tiers is not None:
            stats |= self.tiers.stats()
        if self.copy_receiver is not None:
            stats |= self.copy_receiver.stats()
        return stats | self.adapters.stats(self.intake.count_waiting(stats))

    def adapters_in_use(self) -> tuple[str, ...]:
        """Keys of the adapters that requests use."""
        return tuple(sorted({*self.engine.requests.adapters_in_use, *self.intake.adapters()}))


def _open_lower_tiers(
    context: WorkerContext, engine: Engine, fetches: KvFetches
) -> LowerTiers | None:
    """Open the lower tiers, with copies and restores; None without tiers."""
    section, share = context.config.kv_tiers, context.config.engine.kv_kept_share
    known, member = context.membership, context.member
    tiers = open_tiers(
        *(section, engine.cache, share, member.rank, model_identity(context.me)),
        lambda: needed_ranks(known.generation, known.places, member.node),
    )
    if tiers is None:
        return None
    lower = LowerTiers.of(tiers, engine, fetches.cost, context.connections.wake)
    context.cleanup.callback(lower.close)
    return lower


def _open_copy_receiver(
    context: WorkerContext, engine: Engine, lower: LowerTiers | None
) -> CopyReceiver | None:
    """Start to keep copies of other workers' blocks; None if session copies are off."""
    section, wake = context.config.kv_tiers, context.connections.wake
    if lower is None or not section.session_copies:
        return None
    rate = section.session_copy_bytes_per_s
    keeper = CopyReceiver(lower.tiers, engine.cache, context.kv_peer, wake, rate)
    context.cleanup.callback(keeper.close)
    keeper.start()
    return keeper


def _open_kv_publisher(
    context: WorkerContext, engine: Engine, names: Callable[[], Mapping[str, str]]
) -> Callable[[HashChanges], None]:
    """Start to publish KV events for routers of other projects, if an endpoint is configured.

    Returns a function that publishes (or ignores) changes. ``names``: adapter names by key.
    """
    section, size = context.config.kv_events, context.config.engine.block_size_tokens
    if section.kv_events_endpoint is None:
        return lambda changes: None
    contents = engine.start_recording_contents()
    publisher = KvPublisher(section, context.member.rank, size, names)
    context.cleanup.callback(publisher.close)
    publisher.start()
    return lambda changes: publisher.publish(changes, contents.take())
