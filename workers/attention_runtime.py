"""The attention worker: requests, KV, the scheduler and everything of the model but the experts."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import replace
from typing import Any

from cluster.errors import ExpertMeshError, NotReadyError, QueueFullError, RequestError
from cluster.placement import ExpertPlacement
from cluster.topology import Generation, Member
from workers.checkpoint import load_attention_model
from workers.dist.dispatcher import TokenDispatcher
from workers.dist.local import LocalDispatcher
from workers.dist.remote import RemoteDispatcher
from workers.engine import Engine
from workers.engine_server import (
    AbortRequest,
    AddRequest,
    EngineFacts,
    EngineServer,
    GatewayGone,
    Inbox,
)
from workers.experts.slots import ExpertSlots
from workers.request import FinishReason, Request, StepOutput, TokenOutput
from workers.runtime import IDLE_WAIT_S, WorkerRuntime


class AttentionRuntime(WorkerRuntime):
    """An engine, its stream to the gateways, and its place in the step protocol."""

    _engine: Engine | None = None
    _stream: EngineServer | None = None

    # ---- start and end ----------------------------------------------------------------------

    def _announce(self) -> Member:
        self._inbox = Inbox(self.hub.wake)
        self._owners: dict[str, str] = {}
        self._stream = EngineServer(
            self.args.host, self.config.cluster_token, self._inbox, self._facts
        )
        address = self._stream.start()
        self._cleanup.callback(self._stream.stop)
        return replace(self.member, engine_address=address)

    def _load(self) -> dict[str, Any]:
        model_len = self.config.model.max_model_len
        model = load_attention_model(self.checkpoint, self.dtype, self.args.device, model_len)
        self._dispatcher = self._open_dispatcher()
        self._engine = Engine(
            model=model,
            config=self.family.config,
            banks=self.family.banks,
            dispatcher=self._dispatcher,
            section=self.config.engine,
            max_model_len=model_len,
            rank=self.member.rank,
        )
        return {
            "max_model_len": self._engine.max_model_len,
            "vocab_size": self.family.config.vocab_size,
            "num_kv_blocks": self._engine.num_blocks,
            "model_type": self.family.config.model_type,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def _open_dispatcher(self) -> TokenDispatcher:
        """To the expert workers, or in local mode to all experts in this process."""
        banks, device = self.family.banks, self.args.device
        if self.config.workers.mode == "local":
            slots = ExpertSlots(banks, self.args.num_slots, self.dtype, device)
            slots.load_all(self.checkpoint)
            return LocalDispatcher(slots, banks, self.activity)
        return RemoteDispatcher(
            self.transport,
            banks,
            rank=self.member.rank,
            combine_mode=self.config.engine.combine_mode,
            dtype=self.dtype,
            device=device,
            activity=self.activity,
        )

    def _fence(self, reason: str) -> None:
        if self._stream is not None:
            self._stream.close_streams()

    def _facts(self) -> EngineFacts:
        engine, config = self._engine, self.family.config
        return EngineFacts(
            worker=self.member.name,
            generation=self.generation.number,
            max_model_len=engine.max_model_len if engine is not None else 0,
            vocab_size=config.vocab_size,
            eos_token_ids=config.eos_token_ids,
            max_kv_tokens=(
                engine.num_blocks * self.config.engine.block_size_tokens if engine else 0
            ),
            dtype=str(self.dtype).removeprefix("torch."),
            model_type=config.model_type,
        )

    # ---- the loop ---------------------------------------------------------------------------

    def _enter(self, generation: Generation, placement: ExpertPlacement) -> None:
        self._dispatcher.set_placement(placement, generation)

    def _between_steps(self) -> None:
        """Take what the gateways sent, and tell them what needs no step."""
        engine = self._engine
        assert engine is not None, "the weights are loaded before the first turn"
        for command in self._inbox.take():
            if isinstance(command, AddRequest):
                self._add(engine, command)
            elif isinstance(command, AbortRequest):
                if self._owners.get(command.request_id) == command.gateway:
                    engine.abort(command.request_id, command.choices)
                    self._forget_ended(engine, command.request_id)
            elif isinstance(command, GatewayGone):
                self._drop_gateway(engine, command.gateway)
        self._emit(engine.poll())

    def _turn(self) -> None:
        engine = self._engine
        assert engine is not None, "the weights are loaded before the first turn"
        wanted = engine.wanted()
        self._idle = not engine.has_work
        self.channel.propose(wanted.decode_rows, wanted.prefill_rows)
        header = self.channel.wait(IDLE_WAIT_S)
        if header is None:
            return
        self._idle = False
        outputs = engine.step(header)
        self._last_commit = time.monotonic()
        self._emit(outputs)

    def _add(self, engine: Engine, command: AddRequest) -> None:
        request = command.request
        try:
            engine.add_request(request, received=command.received)
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
            )
            for choice in range(max(request.n, 1))
        )
        assert self._stream is not None
        self._stream.publish(gateway, StepOutput(outputs=outputs))

    def _drop_gateway(self, engine: Engine, gateway: str) -> None:
        for request_id in [r for r, owner in self._owners.items() if owner == gateway]:
            engine.abort(request_id)
            del self._owners[request_id]

    def _emit(self, outputs: list[TokenOutput]) -> None:
        """One message for each gateway that has news."""
        if not outputs:
            return
        by_gateway: defaultdict[str, list[TokenOutput]] = defaultdict(list)
        for output in outputs:
            owner = self._owners.get(output.request_id)
            if owner is not None:
                by_gateway[owner].append(output)
        assert self._stream is not None
        assert self._engine is not None
        for gateway, news in by_gateway.items():
            self._stream.publish(gateway, StepOutput(outputs=tuple(news)))
        for output in outputs:
            if output.finish_reason is not None:
                self._forget_ended(self._engine, output.request_id)

    def _forget_ended(self, engine: Engine, request_id: str) -> None:
        """A request of which no choice runs any more has no owner."""
        if not engine.has_request(request_id):
            self._owners.pop(request_id, None)

    # ---- numbers ----------------------------------------------------------------------------

    def _stats(self) -> dict[str, float]:
        return self._engine.stats() if self._engine is not None else {}

    def _expert_load(self) -> dict[str, list[int]]:
        if self._engine is None:
            return {}
        load = self._engine.expert_load()
        return {f"{bank}:{layer}": counts.tolist() for (bank, layer), counts in load.items()}
