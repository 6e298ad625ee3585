"""The attention worker: requests, KV, the scheduler and everything of the model but the experts."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Set
from dataclasses import replace
from typing import Any

from cluster.errors import ExpertMeshError, NotReadyError, QueueFullError, RequestError
from cluster.load_report import LoadReport
from cluster.placement import ExpertPlacement
from cluster.topology import Generation, Member
from workers.checkpoint import load_attention_model
from workers.dist.dispatcher import TokenDispatcher
from workers.dist.header import StepHeader
from workers.dist.local import LocalDispatcher
from workers.dist.remote import RemoteDispatcher
from workers.dist.traced import TracedDispatcher
from workers.dist.transport import DataTransport
from workers.engine import Engine
from workers.engine_server import (
    AbortRequest,
    AddRequest,
    EngineFacts,
    EngineServer,
    GatewayGone,
    Inbox,
    TurnNoted,
)
from workers.findings import shape_of
from workers.gateway_silence import GATEWAY_SILENCE_LIMIT_S
from workers.grammar import CompiledGrammar
from workers.grammar_compiler import GrammarCompiler
from workers.grammar_gate import GrammarGate
from workers.kv_exchange import KvLending
from workers.kv_gate import KvGate
from workers.kv_link import Asking, KvServer
from workers.request import FinishReason, Request, StepOutput, TokenOutput
from workers.runtime import IDLE_WAIT_S, WorkerRuntime

_MEASURED_ROWS = 32
"""Prompt rows of a step from which it tells how fast prompts are computed."""
_COMMIT_SHARE = 0.25
"""Part of its lease after which an idle leader without its controller runs an empty step."""


class AttentionRuntime(WorkerRuntime):
    """An engine, its stream to the gateways, and its place in the step protocol."""

    _engine: Engine | None = None
    _stream: EngineServer | None = None
    _has_more = False
    """There was work left when the last step was over."""

    # ---- start and end ----------------------------------------------------------------------

    def _announce(self) -> Member:
        self._inbox = Inbox(self.hub.wake)
        self._owners: dict[str, str] = {}
        self._stream = EngineServer(
            self.args.host,
            self.config.cluster_token,
            self._inbox,
            self._facts,
            max(GATEWAY_SILENCE_LIMIT_S, self.config.transport.detection_limit_s),
        )
        address = self._stream.start()
        self._cleanup.callback(self._stream.stop)
        self._kv_server = KvServer(self._me, self.config.cluster_token, host=self.args.host)
        self._cleanup.callback(self._kv_server.close)
        return replace(self.member, engine_address=address, kv_address=self._kv_server.address)

    def _load(self) -> dict[str, Any]:
        model_len = self.config.model.max_model_len
        model = load_attention_model(
            self.checkpoint,
            self.dtype,
            self.args.device,
            model_len,
            self.lanes,
            self.config.engine.deterministic,
        )
        self._dispatcher = self._open_dispatcher()
        traced = TracedDispatcher(self._dispatcher, self.span_sinks, self.family.banks)
        self._dispatcher = self._traced = traced
        config = self.family.config
        self._grammars = GrammarCompiler(
            self.checkpoint.path, config.vocab_size, config.eos_token_ids
        )
        self._grammars.prepare()
        self._gate = GrammarGate(self._grammars.compile, self.hub.wake)
        engine = Engine(
            model=model,
            config=self.family.config,
            banks=self.family.banks,
            dispatcher=self._dispatcher,
            section=self.config.engine,
            max_model_len=model_len,
            rank=self.member.rank,
            lanes=self.lanes,
        )
        self._lend_blocks(engine)
        self._engine = engine
        return {
            "max_model_len": engine.max_model_len,
            "vocab_size": self.family.config.vocab_size,
            "num_kv_blocks": engine.num_blocks,
            "model_type": self.family.config.model_type,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def _lend_blocks(self, engine: Engine) -> None:
        """Other workers may have blocks from here on, and this one may fetch theirs."""
        section = self.config.engine
        limit_s = section.kv_fetch_limit_s if section.enable_prefix_caching else 0.0
        self._kv_gate = KvGate(engine, self._how_to_ask, self.hub.wake, limit_s)
        self._lending = KvLending(engine.exchange, self.hub.wake)
        self._kv_server.start(self._lending)

    def _how_to_ask(self, peer: str, deadline_s: float) -> Asking | None:
        """For KV blocks; None where the peer is no other member of this generation."""
        found = next((m for m in self.membership.generation.members if m.name == peer), None)
        if found is None or not found.kv_address or peer == self.member.name:
            return None
        return Asking(
            peer=peer,
            address=found.kv_address,
            me=self._me,
            token=self.config.cluster_token,
            deadline_s=deadline_s,
        )

    def _open_dispatcher(self) -> TokenDispatcher:
        """To the expert workers, or in local mode to all experts in this process."""
        if self.config.workers.mode == "local":
            slots = self._expert_slots()
            slots.load_all(self.checkpoint)
            return LocalDispatcher(slots, self.family.banks, self.activity)
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
        )

    def _close_gates(self) -> None:
        if self._stream is not None:
            self._stream.close_streams()

    def _open_gates(self) -> None:
        assert self._stream is not None, "it is open before the weights are loaded"
        self._stream.admit_streams()

    def _facts(self) -> EngineFacts:
        engine, config, section = self._engine, self.family.config, self.config.engine
        return EngineFacts(
            worker=self.member.name,
            generation=self.membership.generation.number,
            max_model_len=engine.max_model_len if engine is not None else 0,
            vocab_size=config.vocab_size,
            eos_token_ids=config.eos_token_ids,
            max_kv_tokens=(
                engine.num_blocks * self.config.engine.block_size_tokens if engine else 0
            ),
            dtype=str(self.dtype).removeprefix("torch."),
            model_type=config.model_type,
            hidden_size=config.hidden_size,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            labels=config.labels,
            pad_token_id=config.pad_token_id,
            problem_type=config.problem_type or "",
            banks=shape_of(config, self.family.banks).banks,
            kv_block_size=section.block_size_tokens if section.enable_prefix_caching else 0,
            kv_length_matters_above=config.length_matters_above,
        )

    # ---- the loop ---------------------------------------------------------------------------

    def _enter(self, generation: Generation, placement: ExpertPlacement) -> None:
        self._dispatcher.set_placement(placement, generation)

    def _lose_members(self, names: Set[str]) -> None:
        """See ``WorkerRuntime``."""
        super()._lose_members(names)
        if self._engine is not None:
            self._engine.worker_died()

    def _begin_steps(self) -> None:
        """See ``WorkerRuntime``."""
        if self._engine is not None:
            self._engine.generation_runs()

    def _between_steps(self) -> None:
        """Take what the gateways sent, and tell them what needs no step."""
        engine = self._engine
        assert engine is not None, "the weights are loaded before the first turn"
        self._lending.turn()
        for command in self._inbox.take():
            if isinstance(command, AddRequest):
                self._receive(engine, command)
            elif isinstance(command, AbortRequest):
                for gate in () if command.choices else (self._gate, self._kv_gate):
                    if gate.owner(command.request_id) == command.gateway:
                        gate.drop(command.request_id)
                if self._owners.get(command.request_id) == command.gateway:
                    engine.abort(command.request_id, command.choices)
                    self._forget_ended(engine, command.request_id)
            elif isinstance(command, TurnNoted):
                if self._owners.get(command.turn.request_id) == command.gateway:
                    engine.begin_turn(command.turn)
            elif isinstance(command, GatewayGone):
                self._drop_gateway(engine, command.gateway)
        for ready in self._kv_gate.take():
            self._prepare(engine, ready)
        for gated in self._gate.take():
            if gated.error is None:
                self._add(engine, gated.command, gated.compiled)
            else:
                self._refuse(gated.command.gateway, gated.command.request, gated.error)
        self._emit(engine.poll())
        self._tell_turns(engine)

    def _tell_turns(self, engine: Engine) -> None:
        """Requests that run a step alone: their gateways must know before and after."""
        assert self._stream is not None
        for turn in engine.take_turns():
            if (owner := self._owners.get(turn.request_id)) is not None:
                self._stream.publish_turn(owner, turn)

    def _turn(self) -> None:
        engine = self._engine
        assert engine is not None, "the weights are loaded before the first turn"
        wanted = engine.wanted()
        self._idle = not engine.has_work
        self.channel.propose(
            wanted.decode_rows,
            wanted.prefill_rows,
            is_alone=wanted.is_alone,
            even_empty=self._needs_a_commit(),
        )
        idle_s = min(IDLE_WAIT_S, self.lease_s * _COMMIT_SHARE)
        header = self.channel.wait(self._gate.wait_s(self._kv_gate.wait_s(idle_s)))
        if header is None:
            return
        self._idle = False
        stall_s = time.monotonic() - self.membership.last_commit if self._has_more else 0.0
        self.membership.follow_epoch(header, stall_s)
        self._has_more = False
        outputs = self._step(engine, header)
        self.membership.last_commit = time.monotonic()
        self._has_more = engine.has_work
        self._emit(outputs)

    def _needs_a_commit(self) -> bool:
        """The controller has been silent for a while: an empty step renews everybody's lease."""
        known = max(self.control.contact_at, self.membership.last_commit)
        return time.monotonic() - known > self.lease_s * _COMMIT_SHARE

    def _step(self, engine: Engine, header: StepHeader) -> list[TokenOutput]:
        begin = time.monotonic()
        outputs = engine.step(header)
        if (rows := header.grant(self.member.rank).prefill_rows) >= _MEASURED_ROWS:
            self._kv_gate.pace.observe_prefill(rows, time.monotonic() - begin)
        if self._traced is not None:
            self._traced.end_step()
        return outputs

    def _receive(self, engine: Engine, command: AddRequest) -> None:
        """Hand a request to the engine, or let it wait for KV blocks, then for its grammar."""
        self._gate.drop(command.request.request_id)
        self._kv_gate.drop(command.request.request_id)
        if not self._kv_gate.put(command):
            self._prepare(engine, command)

    def _prepare(self, engine: Engine, command: AddRequest) -> None:
        grammar = command.request.params.grammar
        compiled = None if grammar is None else self._grammars.cached(grammar)
        if grammar is None or compiled is not None:
            self._add(engine, command, compiled)
        else:
            self._gate.put(command)

    def _add(self, engine: Engine, command: AddRequest, grammar: CompiledGrammar | None) -> None:
        request = command.request
        try:
            engine.add_request(request, received=command.received, grammar=grammar)
        except (RequestError, QueueFullError, NotReadyError) as err:
            self._refuse(command.gateway, request, err)
            return
        self._owners[request.request_id] = command.gateway

    def _refuse(self, gateway: str, request: Request, err: ExpertMeshError) -> None:
        """Every choice of a request that is not taken ends with the reason."""
        code = "queue_full" if isinstance(err, QueueFullError) else getattr(err, "code", "")
        outputs = tuple(
            TokenOutput(
                request_id=request.request_id,
                attempt=request.attempt,
                choice=choice,
                index=0,
                finish_reason=FinishReason.ERROR,
                error=str(err),
                error_code=code,
                error_param=getattr(err, "param", None),
            )
            for choice in range(max(request.n, 1))
        )
        assert self._stream is not None
        self._stream.publish(gateway, StepOutput(outputs=outputs))

    def _drop_gateway(self, engine: Engine, gateway: str) -> None:
        self._gate.drop_gateway(gateway)
        self._kv_gate.drop_gateway(gateway)
        for request_id in [r for r, owner in self._owners.items() if owner == gateway]:
            engine.abort(request_id)
            del self._owners[request_id]

    def _emit(self, outputs: list[TokenOutput]) -> None:
        """One message for each gateway that has news of its requests, one for all of the blocks."""
        assert self._stream is not None
        assert self._engine is not None
        if self.config.engine.enable_prefix_caching:
            self._stream.publish_kv(self._engine.take_kv_changes(), self._kv_gate.fetch_cost)
        if not outputs:
            return
        by_gateway: defaultdict[str, list[TokenOutput]] = defaultdict(list)
        for output in outputs:
            owner = self._owners.get(output.request_id)
            if owner is not None:
                by_gateway[owner].append(output)
        for gateway, news in by_gateway.items():
            large = [output for output in news if output.arrays]
            small = tuple(output for output in news if not output.arrays)
            for outputs_of_message in ([small] if small else []) + [(one,) for one in large]:
                self._stream.publish(gateway, StepOutput(outputs=outputs_of_message))
        for output in outputs:
            if output.finish_reason is not None:
                self._forget_ended(self._engine, output.request_id)

    def _forget_ended(self, engine: Engine, request_id: str) -> None:
        """A request of which no choice runs any more has no owner."""
        if not engine.has_request(request_id):
            self._owners.pop(request_id, None)

    # ---- numbers ----------------------------------------------------------------------------

    def _stats(self) -> dict[str, float]:
        if self._engine is None:
            return {}
        stats = {**self._engine.stats(), **self._kv_gate.stats()}
        for reason, gate in (("grammar", self._gate), ("kv", self._kv_gate)):
            stats["num_requests_waiting"] += gate.num_waiting
            name = f'num_requests_waiting_by_reason{{reason="{reason}"}}'
            stats[name] = float(gate.num_waiting)
        return stats

    def _load_report(self) -> LoadReport | None:
        return None if self._engine is None else self._engine.load.report()
