"""The attention worker: requests, KV cache, scheduler, and the model without its experts."""

from __future__ import annotations

import sys
import time
from collections.abc import Set
from functools import partial
from typing import Any

from msgspec.structs import replace

from cluster.core.errors import (
    ExpertMeshError,
    NotReadyError,
    PeerLostError,
    QueueFullError,
    RequestError,
    TransportError,
)
from cluster.core.frames import KeepAdapters
from cluster.core.load_report import LoadReport
from cluster.core.placement import ExpertPlacement
from cluster.core.topology import Generation, Member
from workers.dispatch.dispatcher import TokenDispatcher
from workers.dispatch.local import LocalDispatcher
from workers.dispatch.remote import RemoteDispatcher
from workers.engine.engine import Engine
from workers.engine.step_watchdog import StepWatchdog
from workers.inspection.buffers import shape_of
from workers.kv.tiers.tiers import KvTiers
from workers.kv.transfer.lender import KvLender
from workers.model.loading.attention_model import load_attention_model
from workers.process.engine_server import EngineServer
from workers.process.gateway_streams import GATEWAY_SILENCE_LIMIT_S
from workers.process.gpu_room import check_room_for_states, section_for_gpu
from workers.process.intake.adapters import AdapterIntake
from workers.process.intake.commands import (
    AddRequest,
    Command,
    CopyAsked,
    GatewayGone,
    Inbox,
    PrefetchAsked,
)
from workers.process.intake.copy_keeper import CopyKeeper
from workers.process.intake.grammar_compilations import GrammarCompilations
from workers.process.intake.kv_fetches import KvFetches
from workers.process.intake.lower_tiers import LowerTiers, open_tiers
from workers.process.intake.solo_steps import SoloStepReporter
from workers.process.intake.waiting import WaitingRequests, count_waiting, stale_error
from workers.process.kv_identity import kv_identity, model_identity, needed_ranks
from workers.process.kv_publisher import KvPublisher
from workers.process.runtime import IDLE_WAIT_S, WorkerRuntime
from workers.process.step_messages import step_messages
from workers.process.warm_up import warm_attention
from workers.requests.block_hash import HASH_BYTES
from workers.requests.request import (
    Queued,
    Request,
    SoloStep,
    StepOutput,
    TokenOutput,
)
from workers.requests.sequence import Failure, failed
from workers.requests.step_header import StepHeader
from workers.requests.wire import Abort, EngineHello, Pause, Paused, Relieve
from workers.sampling.grammar import CompiledGrammar
from workers.sampling.grammar_compiler import GrammarCompiler
from workers.scheduling.step_plan import RowsWanted
from workers.transport.path_watch import LOOK_S
from workers.transport.peer_link import Peer
from workers.transport.transport import DataTransport

_RELIEF_PAUSE_S = 0.1
"""Time between two requests that a worker asks to be moved."""
_MEASURED_ROWS = 32
"""Prompt rows of a step from which on its time measures the speed of prefill."""
_COMMIT_SHARE = 0.25
"""Share of the lease after which an idle leader without a controller runs an empty step."""


class AttentionRuntime(WorkerRuntime):
    """An engine, its stream to the gateways, and its place in the step protocol."""

    _engine: Engine | None = None
    _stream: EngineServer | None = None
    _has_more = False
    """Work was left after the last step."""
    _relief_at = 0.0
    """Monotonic time at which it last asked to have a request moved."""
    _tiers: LowerTiers | None = None
    """Copies of blocks in host memory and on disk."""
    _kv_publisher: KvPublisher | None = None
    """Tells routers of other projects what is cached."""
    _copy_keeper: CopyKeeper | None = None
    """Keeps copies of other workers' blocks."""

    # ---- start and end ----------------------------------------------------------------------

    def _announce(self) -> Member:
        self._inbox = Inbox(self.connections.wake)
        self._owners: dict[str, str] = {}
        self._watchdog = StepWatchdog(self.config.transport.detection_limit_s)
        self._stream = EngineServer(
            self.args.host,
            self.config.cluster_token,
            self._inbox,
            self._facts,
            max(GATEWAY_SILENCE_LIMIT_S, self.config.transport.detection_limit_s),
        )
        address = self._stream.start()
        self._cleanup.callback(self._stream.stop)
        self._kv_server = self._peer_server("kv-blocks", HASH_BYTES)
        return replace(self.member, engine_address=address, kv_address=self._kv_server.address)

    def _load(self) -> dict[str, Any]:
        model_len = self.config.model.max_model_len
        model = load_attention_model(
            self.checkpoint,
            self.dtype,
            self.args.device,
            model_len,
            self.compute_threads,
            self.config.engine.deterministic == "on",
            self.kernels.team,
            self._form_of_products(),
        )
        self._timer = self._new_timer()
        self._dispatcher = self._open_dispatcher()
        config = self.family.config
        self._grammars = GrammarCompiler(
            self.checkpoint.path, config.vocab_size, config.eos_token_ids
        )
        self._grammars.prepare()
        self._compilations = GrammarCompilations(self._grammars.compile, self.connections.wake)
        self._cleanup.callback(self._compilations.close)
        make_engine = partial(
            Engine,
            model=model,
            config=config,
            banks=self.family.banks,
            speculation=self.config.speculation,
            max_model_len=model_len,
            rank=self.member.rank,
            compute_threads=self.compute_threads,
            team=self.kernels.team,
            is_exact=bool(self.member.offer.kernels),
            lora=self.config.lora,
        )
        check_room_for_states(self.args, self.family)
        warm_attention(self.args, self.family, self.dtype, make_engine, self._dispatcher)
        section = section_for_gpu(self.args, self.family, self.dtype, self.transport)
        engine = make_engine(dispatcher=self._dispatcher, section=section)
        if self.args.device.type == "cuda":
            engine.runner.capture_graphs()
        self._lend_blocks(engine)
        self._adapters = AdapterIntake(engine, self.connections.wake)
        self._cleanup.callback(self._adapters.close)
        self._publish_contents(engine)
        assert self._stream is not None, "it is open before the weights are loaded"
        engine.runner.on_compute = self._stream.release
        self._solo_steps = SoloStepReporter(engine, self._stream.publish)
        self._engine = engine
        return {
            "max_model_len": engine.max_model_len,
            "vocab_size": config.vocab_size,
            "num_kv_blocks": engine.pool.num_blocks,
            "model_type": config.model_type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "kv_cache_dtype": self.config.engine.kv_cache_dtype,
        }

    def _lend_blocks(self, engine: Engine) -> None:
        """Begin to lend blocks to other workers, and to fetch theirs."""
        section = self.config.engine
        limit_s = section.kv_fetch_limit_s if section.enable_prefix_caching else 0.0
        self._fetches = KvFetches(engine, self._kv_peer, self.connections.wake, limit_s)
        self._cleanup.callback(self._fetches.close)
        self._open_tiers(engine)
        lower = None if self._tiers is None else self._tiers.tiers
        self._kv_lender = KvLender(engine.kv_store, self.connections.wake, tiers=lower)
        self._kv_server.start(self._kv_lender)

    def _open_tiers(self, engine: Engine) -> None:
        """Begin to copy blocks into lower tiers, and to restore them, if there are any."""
        section, share = self.config.kv_tiers, self.config.engine.kv_kept_share
        known, rank, node = self.membership, self.member.rank, self.member.node
        tiers = open_tiers(
            *(section, engine.cache, share, rank, model_identity(self._me)),
            lambda: needed_ranks(known.generation, known.places, node),
        )
        if tiers is not None:
            self._tiers = LowerTiers.of(tiers, engine, self._fetches.cost, self.connections.wake)
            self._cleanup.callback(self._tiers.close)
            self._keep_copies(tiers, engine)

    def _keep_copies(self, tiers: KvTiers, engine: Engine) -> None:
        """Begin to keep copies of other workers' blocks, if that is wanted."""
        section = self.config.kv_tiers
        if section.session_copies:
            wake, rate = self.connections.wake, section.session_copy_bytes_per_s
            self._copy_keeper = CopyKeeper(tiers, engine.cache, self._kv_peer, wake, rate)
            self._cleanup.callback(self._copy_keeper.close)
            self._copy_keeper.start()

    def _publish_contents(self, engine: Engine) -> None:
        """Begin to tell routers of other projects what is cached, if that is asked for."""
        section = self.config.kv_events
        if section.kv_events_endpoint is None:
            return
        size, names = self.config.engine.block_size_tokens, lambda: self._adapters.names
        self._contents = engine.note_contents()
        self._kv_publisher = KvPublisher(section, self.member.rank, size, names)
        self._cleanup.callback(self._kv_publisher.close)
        self._kv_publisher.start()

    def _kv_peer(self, name: str) -> Peer | None:
        """The KV server of another member of this generation; None for any other name."""
        found = next((m for m in self.membership.generation.members if m.name == name), None)
        if found is None or not found.kv_address or name == self.member.name:
            return None
        token = self.config.cluster_token
        return Peer(name=name, address=found.kv_address, me=self._me, token=token)

    def _open_dispatcher(self) -> TokenDispatcher:
        """The dispatcher to the expert workers; in local mode, to all experts in this process."""
        if self.config.workers.mode == "local":
            slots = self._expert_slots()
            slots.load_all(self.checkpoint)
            return LocalDispatcher(slots.banks, self.family.banks, self.activity, self._timer)
        return self._remote_dispatcher(self.transport)

    def _remote_dispatcher(self, transport: DataTransport) -> RemoteDispatcher:
        return RemoteDispatcher(
            transport,
            self.family.banks,
            rank=self.member.rank,
            combine_mode=self.config.engine.combine_mode,
            dtype=self.dtype,
            device=self.args.device,
            activity=self.activity,
            timer=self._timer,
            team=self.kernels.team,
        )

    def _close_gates(self, fence: int) -> None:
        super()._close_gates(fence)
        if self._stream is not None:
            self._stream.close_streams(fence)

    def _facts(self) -> EngineHello:
        engine, config, section = self._engine, self.family.config, self.config.engine
        return EngineHello(
            worker=self.member.name,
            generation=self.membership.generation.number,
            max_model_len=engine.max_model_len if engine is not None else 0,
            vocab_size=config.vocab_size,
            eos_token_ids=config.eos_token_ids,
            max_kv_tokens=(
                engine.pool.num_blocks * self.config.engine.block_size_tokens if engine else 0
            ),
            dtype=str(self.dtype).removeprefix("torch."),
            model_type=config.model_type,
            hidden_size=config.hidden_size,
            num_layers=config.num_layers,
            num_attention_layers=len(config.kv_layers),
            num_heads=config.num_heads,
            labels=config.labels,
            pad_token_id=config.pad_token_id,
            problem_type=config.problem_type or "",
            banks=shape_of(config, self.family.banks).banks,
            kv_block_size=section.block_size_tokens if section.enable_prefix_caching else 0,
            kv_length_matters_above=config.length_matters_above,
            keeps_copies=self._copy_keeper is not None,
        )

    # ---- the loop ---------------------------------------------------------------------------

    def _enter(self, generation: Generation, placement: ExpertPlacement) -> None:
        self._dispatcher.set_placement(placement, generation)
        if self._tiers is not None and self._engine is not None:
            how = (self._quantize(), self.dtype), self._engine.cache
            self._tiers.tiers.use(kv_identity(self._me, self.config, generation, *how))

    def _lose_members(self, names: Set[str]) -> None:
        super()._lose_members(names)
        if self._engine is not None:
            self._engine.worker_died()

    def _begin_steps(self) -> None:
        super()._begin_steps()
        assert self._stream is not None, "it is open before the weights are loaded"
        if self._engine is not None:
            self._engine.generation_runs()
        self._watchdog.begin()
        self._stream.admit_streams(self.membership.generation.number)

    def _between_steps(self) -> None:
        """Handle the gateways' commands, and send outputs that need no step."""
        engine = self._engine
        assert engine is not None, "the weights are loaded before the loop begins"
        assert self._stream is not None
        self._kv_lender.answer()
        for command in self._take_commands():
            self._handle(engine, command)
        if self._tiers is not None:
            self._tiers.copies.go_on()
            for restored in self._tiers.restores.take():
                self._end_restore(engine, restored)
        for ready in self._fetches.take():
            self._end_fetch(engine, ready)
        for gateway, prefetched in self._fetches.take_prefetched():
            self._stream.publish(gateway, prefetched)
        for done in self._compilations.take():
            if done.error is None:
                self._add(engine, done.command, done.compiled)
            else:
                self._refuse(done.command.gateway, done.command.request, done.error)
        self._bring_blocks(engine)
        if (kept := self._adapters.go_on()) is not None:
            self.control.send(kept)
        self._emit(engine.poll())
        self._solo_steps.report(self._owners)
        self._report_paused(engine)
        if not self.membership.runs:
            self._stream.release()

    def _keep_adapters(self, order: KeepAdapters) -> None:
        self._adapters.take(order)

    def _adapters_in_use(self) -> tuple[str, ...]:
        if self._engine is None:
            return ()
        waiting = (requests.adapters for requests in self._intakes)
        return tuple(sorted({*self._engine.adapters_in_use}.union(*waiting)))

    @property
    def _intakes(self) -> tuple[WaitingRequests, ...]:
        """Where requests may wait before the engine runs them."""
        known = (self._compilations, self._fetches)
        return known if self._tiers is None else (*known, self._tiers.restores)

    def _take_commands(self) -> list[Command]:
        """Commands of gateways since the last call."""
        return self._inbox.take()

    def _handle(self, engine: Engine, command: Command) -> None:
        if isinstance(command, AddRequest):
            self._receive(engine, command)
        elif isinstance(command, PrefetchAsked):
            self._fetches.prefetch(command)
        elif isinstance(command, CopyAsked):
            if self._copy_keeper is not None:
                self._copy_keeper.put(command.message)
        elif isinstance(command, GatewayGone):
            self._drop_gateway(engine, command.gateway)
        elif isinstance(command.message, Abort):
            self._abort(engine, command.gateway, command.message)
        elif isinstance(command.message, SoloStep):
            self._solo_steps.acknowledge(command.gateway, command.message)
        elif self._owners.get(command.message.request_id) != command.gateway:
            return  # it is not in the engine any more, or not yet
        else:
            self._pause(engine, command.message)

    def _abort(self, engine: Engine, gateway: str, abort: Abort) -> None:
        for waiting in self._intakes:
            if waiting.owner(abort.request_id) == gateway:
                waiting.drop(abort.request_id, abort.choices)
        if self._owners.get(abort.request_id) == gateway:
            engine.abort(abort.request_id, abort.choices)
            self._forget_ended(engine, abort.request_id)

    def _pause(self, engine: Engine, pause: Pause) -> None:
        if pause.is_over:
            engine.resume(pause.request_id)
        else:
            engine.pause(pause.request_id, pause.num_tokens)

    def _report_paused(self, engine: Engine) -> None:
        """Tell gateways which requests stand still, behind their last outputs."""
        assert self._stream is not None
        for request_id in engine.take_paused():
            self._stream.publish(self._owners[request_id], Paused(request_id=request_id))
            self._stream.release()

    def _run_step(self) -> None:
        """Run a step. Its outputs are sent while the next one computes, if one follows."""
        assert self._stream is not None
        try:
            self._run_next_step(self._stream)
        except TransportError:
            self._stream.release()
            raise
        if not self._has_more:
            self._stream.release()

    def _run_next_step(self, stream: EngineServer) -> None:
        engine = self._engine
        assert engine is not None, "the weights are loaded before the loop begins"
        wanted = engine.wanted()
        self.activity.is_idle = not engine.has_work
        self.activity.wants_rows = wanted.decode_rows + wanted.prefill_rows > 0
        self.channel.propose(wanted, even_empty=self._needs_a_commit())
        if not self.channel.has_header:
            stream.release()
        header = self.channel.wait(min(w.wait_s(self._idle_s()) for w in self._intakes))
        if self.connections.is_settled:
            self.membership.confirm()
        if header is None:
            self._check_overdue(wanted)
            return
        self.activity.is_idle = False
        self.activity.rows = header.decode_rows + header.prefill_rows
        stall_s = time.monotonic() - self.membership.last_commit if self._has_more else 0.0
        self.membership.follow_epoch(header, stall_s)
        self._has_more = False
        outputs = self._step(engine, header)
        self.membership.committed(is_shared=bool(self.activity.rows) or not self.channel.is_leader)
        self.activity.advance()
        self._has_more = engine.has_work
        stream.release()  # a step without rows has not computed
        stream.hold()
        self._emit(outputs)
        self._ask_for_relief(engine, stream)

    def _ask_for_relief(self, engine: Engine, stream: EngineServer) -> None:
        """Have a request move where another worker has room, before it must be preempted."""
        pressed, now = engine.under_pressure(), time.monotonic()
        if pressed is None or now < self._relief_at + _RELIEF_PAUSE_S:
            return
        owner = self._owners.get(pressed.request_id)
        if owner is not None and len(self.membership.generation.attention) > 1:
            self._relief_at = now
            message = Relieve(request_id=pressed.request_id, attempt=pressed.attempt)
            stream.publish(owner, message)

    def _check_overdue(self, wanted: RowsWanted) -> None:
        """Raises ``PeerLostError`` when no step has come for too long, although rows are wanted."""
        waited_s = self._watchdog.overdue_s(
            wants=wanted.decode_rows + wanted.prefill_rows > 0,
            leads=self.channel.is_leader,
            last_rows=self.channel.last_rows,
            last_commit=self.membership.last_commit,
            now=time.monotonic(),
        )
        missing = self.channel.missing()
        if waited_s is None or not missing:
            return
        reason = f"no step for {waited_s:.1f} s, waits for {', '.join(missing)}"
        raise PeerLostError(missing[0], reason, is_late=True)

    def _idle_s(self) -> float:
        """Longest wait for a header: a leader soon looks whether others have its empty one."""
        if self.membership.last_shared_commit < self.membership.last_commit:
            return LOOK_S
        return min(IDLE_WAIT_S, self.config.transport.lease_s * _COMMIT_SHARE)

    def _needs_a_commit(self) -> bool:
        """The controller is silent: an empty step renews the leases of all workers."""
        known = max(self.control.contact_at, self.membership.last_commit)
        return time.monotonic() - known > self.config.transport.lease_s * _COMMIT_SHARE

    def _step(self, engine: Engine, header: StepHeader) -> list[TokenOutput]:
        begin = time.monotonic()
        outputs = engine.step(header)
        if (rows := header.grant(self.member.rank).prefill_rows) >= _MEASURED_ROWS:
            self._fetches.cost.observe_prefill(rows, time.monotonic() - begin)
        self._timer.end_step("sample")
        return outputs

    def _receive(self, engine: Engine, command: AddRequest) -> None:
        """Hand a request to the engine. It may wait here for KV blocks that are fetched ahead of
        it, and for its grammar."""
        request = command.request
        name, is_expected = request.request_id, self._fetches.expects(request)
        if (stale := stale_error(request, self._intakes)) is not None:
            self._refuse(command.gateway, request, stale)
            return
        for waiting in self._intakes:  # an older attempt
            if not (is_expected and waiting is self._fetches):
                waiting.drop(name)
        engine.kv_came(name)  # it may stay, where the engine refuses this one
        if not (is_expected and self._fetches.put(command)):
            self._prepare(engine, command)

    def _bring_blocks(self, engine: Engine) -> None:
        """Let requests for which there is room wait for KV blocks of a tier, then for those of a
        peer."""
        if self._tiers is None and len(self.membership.generation.attention) < 2:
            return
        at_most = sys.maxsize if self._tiers is None else self._tiers.restores.num_free_jobs
        for request, hashes in engine.take_admissible(at_most):
            name, num_free = request.request_id, engine.pool.num_free
            if any(waiting.owner(name) is not None for waiting in self._intakes):
                continue  # a newer attempt
            gateway = self._owners[name]
            queued = AddRequest(gateway, request, time.monotonic(), hashes, is_queued=True)
            if self._restore(queued) or self._fetches.put(queued):
                engine.wait_for_kv(name, num_free - engine.pool.num_free)

    def _restore(self, queued: AddRequest) -> bool:
        return self._tiers is not None and self._tiers.restores.put(queued)

    def _end_restore(self, engine: Engine, restored: AddRequest) -> None:
        """A request whose beginning came for another one may wait for the rest."""
        name, num_free = restored.request.request_id, engine.pool.num_free
        if engine.has_request(name) and (
            (restored.has_joined and self._restore(restored)) or self._fetches.put(restored)
        ):
            engine.wait_for_kv(name, num_free - engine.pool.num_free)
        else:
            engine.kv_came(name)

    def _end_fetch(self, engine: Engine, fetched: AddRequest) -> None:
        if fetched.is_queued:
            engine.kv_came(fetched.request.request_id)
        else:
            self._prepare(engine, fetched)

    def _prepare(self, engine: Engine, command: AddRequest) -> None:
        grammar, owner = command.request.params.grammar, command.request.cache_salt
        compiled = None if grammar is None else self._grammars.cached(grammar, owner)
        if grammar is None or compiled is not None:
            self._add(engine, command, compiled)
        else:
            self._compilations.put(command)

    def _add(self, engine: Engine, command: AddRequest, grammar: CompiledGrammar | None) -> None:
        request = command.request
        try:
            engine.add_request(request, command.received, grammar, command.hashes)
        except (RequestError, QueueFullError, NotReadyError) as err:
            self._refuse(command.gateway, request, err)
            return
        self._owners[request.request_id] = command.gateway
        queued = Queued(request_id=request.request_id, attempt=request.attempt)
        assert self._stream is not None
        self._stream.publish(command.gateway, queued)

    def _refuse(self, gateway: str, request: Request, err: ExpertMeshError) -> None:
        """End every choice of a refused request with the error."""
        code = "queue_full" if isinstance(err, QueueFullError) else getattr(err, "code", "")
        failure = Failure(str(err), code, getattr(err, "param", None))
        outputs = tuple(failed(request, choice, failure) for choice in range(max(request.n, 1)))
        assert self._stream is not None
        self._stream.publish(gateway, StepOutput(outputs=outputs))

    def _drop_gateway(self, engine: Engine, gateway: str) -> None:
        for waiting in self._intakes:
            waiting.drop_gateway(gateway)
        for request_id in [r for r, owner in self._owners.items() if owner == gateway]:
            engine.abort(request_id)
            del self._owners[request_id]
        self._solo_steps.drop_gateway(gateway)

    def _emit(self, outputs: list[TokenOutput]) -> None:
        """Send each gateway the outputs of its requests, and all gateways the changed KV blocks."""
        assert self._stream is not None
        assert self._engine is not None
        if self.config.engine.enable_prefix_caching:
            pool = self._engine.pool
            changes, cost = pool.take_changes(), self._fetches.fetch_cost
            held = changes if self._tiers is None else self._tiers.changes(changes, self._engine)
            self._stream.publish_kv(held, cost, pool.num_free)
            if self._kv_publisher is not None:
                self._kv_publisher.publish(changes, self._contents.take())
        for gateway, message in step_messages(outputs, self._owners):
            self._stream.publish(gateway, message)
        for output in outputs:
            if output.finish_reason is not None:
                self._forget_ended(self._engine, output.request_id)

    def _forget_ended(self, engine: Engine, request_id: str) -> None:
        """Drop the owner of a request that has ended."""
        if not engine.has_request(request_id):
            self._owners.pop(request_id, None)

    # ---- numbers ----------------------------------------------------------------------------

    def _stats(self) -> dict[str, float]:
        stats = super()._stats()
        if self._engine is None:
            return stats
        stats |= {**self._engine.stats(), **self._fetches.stats()}
        if self._tiers is not None:
            stats |= self._tiers.stats()
        if self._copy_keeper is not None:
            stats |= self._copy_keeper.stats()
        return stats | self._adapters.stats(count_waiting(stats, self._intakes))

    def _problems(self) -> tuple[str, ...]:
        return () if self._tiers is None else self._tiers.problems(self.member.name)

    def _load_report(self) -> LoadReport | None:
        return None if self._engine is None else self._engine.load.report()
