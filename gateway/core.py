"""The gateway behind both codecs: validated calls in, running generations out.

``Gateway.start`` is the life of a request up to the engine: validate, tokenize, admit, pick a
worker, hand over. HTTP and gRPC are two thin codecs over it.
"""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

from cluster.config import ClusterConfig
from cluster.errors import (
    DeadlineExceededError,
    ModelNotFoundError,
    NotReadyError,
    QueueFullError,
)
from cluster.gateway_config import EndStage
from gateway.admission import Admission
from gateway.auth import CALLER, make_key_rings
from gateway.call import CallKind, GenerateCall, GenerateFields
from gateway.cluster_view import (
    ClusterView,
    Snapshot,
    attention_endpoints,
    drained_workers,
)
from gateway.engine_pool import EnginePool
from gateway.field_checks import check_fields
from gateway.generation import Generation
from gateway.metrics import GatewayMetrics
from gateway.model import ModelFacts
from gateway.output_queue import OutputQueue
from gateway.peers import NoPeers, Peers, ReplicaAnswers
from gateway.prompts import PromptMaker
from gateway.request_id import REQUEST_ID
from gateway.running_calls import RunningCalls
from gateway.submission import Submission
from gateway.tokenizer import Tokenizer
from gateway.tracing import TRACE, start_tracing
from gateway.validate import finish_call
from protos.engine_pb2 import EngineHello
from workers.inspection import BankShape, ModelShape
from workers.request import Request

LEAVING_LEAD_S = 10.0
"""Time from the moment at which a gateway that leaves says so to its last new gRPC connection:
whoever leads clients here must hear of it first."""
_STREAM_WAIT_S = 5.0
"""Time that a serving cluster without an open stream is given to open one."""
_LOOK_S = 0.5
"""Time after which a request that waits for a worker looks whether it is wanted still."""

_TURNS_TO_LEAVE = 2
"""Turns of the event loop in which a request is given to a worker and written to its stream. What
the codecs do next takes as long as a hop: the engine need not wait for it."""


class Gateway:
    """One replica.

    Args:
        config: the cluster's configuration.
        tokenizer: None where the checkpoint has none: prompts must be token ids then.
        cluster: follows the controller.
        engines: streams to the attention workers; fed from ``cluster`` here.
        name: of this replica.
    """

    def __init__(
        self,
        config: ClusterConfig,
        tokenizer: Tokenizer | None,
        cluster: ClusterView,
        engines: EnginePool,
        name: str = "gateway",
    ) -> None:
        self.config = config
        self.limits = config.gateway
        self.tokenizer = tokenizer
        self.prompts = PromptMaker(tokenizer, config.gateway.trust_request_chat_template)
        self.cluster = cluster
        self.engines = engines
        self.name = name
        self.keys, self.admin_keys = make_key_rings(config.gateway)
        self.model_name = config.model.served_model_name
        self.created = int(time.time())
        self.addresses: dict[str, Any] = {}
        self.running = RunningCalls()
        self.answers = ReplicaAnswers(self)
        self.peers: Peers = NoPeers(self.answers)
        self.metrics = GatewayMetrics(
            self.model_name,
            lambda: self.cluster.snapshot,
            {
                "block_size": str(config.engine.block_size_tokens),
                "enable_prefix_caching": str(config.engine.enable_prefix_caching),
            },
            lambda: self.cluster.known_load,
            config.gateway.metrics_all_experts,
            config.gateway.metrics_prefix,
        )
        self.tracing = start_tracing(
            config.observability, name, self.model_name, lambda: self.addresses, self._to_text
        )
        self._leaves_since_s: float | None = None
        self._takes_calls = True
        self._admission: Admission | None = None
        self._hello: EngineHello | None = None
        self._facts: ModelFacts | None = None
        self._draw_seed = _seed_source(config.engine.seed, name)
        cluster.listen(self._follow)
        if self.tracing is not None:
            cluster.listen(self.tracing.see)
        engines.on_resubmit = self._observe_resubmitted

    @property
    def facts(self) -> ModelFacts | None:
        """The served model's limits; None until a worker or the controller has told them."""
        hello = next((client.hello for client in self.engines.clients), None)
        if hello is not None and hello is not self._hello:
            self._hello, self._facts = hello, _facts(self.model_name, hello)
        return self._facts

    @property
    def placement_epoch(self) -> int:
        """The placement in force, as far as known here."""
        return int((self.cluster.snapshot or {}).get("placement_epoch") or 0)

    @property
    def is_leaving(self) -> bool:
        """It serves whoever still comes, but nobody should."""
        return self._leaves_since_s is not None

    def leave(self, now_s: float) -> int:
        """Be ready for no more clients, for good; the requests that still run here."""
        if self._leaves_since_s is None:
            self._leaves_since_s = now_s
        return self._admission.num_requests if self._admission else 0

    def end(self, stage: EndStage, now_s: float) -> int:
        """Go with the whole server, stage after stage; the requests that still run here."""
        left = self.leave(now_s)
        if stage != "lead":
            self._takes_calls = False
        if stage == "fail":
            self.running.fail(_ended())
        return left

    def has_left(self, now_s: float) -> bool:
        """Whether who leads clients here has had time to hear of it."""
        return self._leaves_since_s is not None and now_s >= self._leaves_since_s + LEAVING_LEAD_S

    def not_ready_reasons(self) -> list[str]:
        """Why new requests cannot be served now; empty when they can."""
        if self.is_leaving:
            return ["this gateway is about to stop"]
        snapshot = self.cluster.snapshot
        if snapshot is None:
            return ["the controller has not answered yet"]
        state = snapshot["state"]
        reasons = []
        if state not in ("SERVING", "DEGRADED"):
            reasons.append(f"the cluster is {state}" + _because(snapshot.get("error")))
        if not snapshot.get("experts_complete", True):
            reasons.append("some experts are on no worker")
        if not self.engines.clients:
            reasons.append("no attention worker has an open stream")
        return reasons

    def check_model(self, name: str | None) -> None:
        """Raise ``ModelNotFoundError`` unless the name (None: any) is the served model's."""
        if name is not None and name != self.model_name:
            raise ModelNotFoundError(f"the model {name[:128]!r} does not exist")

    def timeout_s(self, wanted_s: float | None) -> float:
        """The client's time limit within the server's."""
        most = self.limits.request_timeout_s
        return most if wanted_s is None else min(wanted_s, most)

    async def start(
        self, fields: GenerateFields, call_id: str, wanted_timeout_s: float | None = None
    ) -> Generation:
        """Validate a call and hand it to the engines.

        Raises:
            RequestError: it is wrong (and its subclasses).
            QueueFullError: too much is going on.
            NotReadyError: the cluster cannot serve it.
            DeadlineExceededError: its time was over before an engine had it.
        """
        started_s = time.monotonic()
        deadline_s = started_s + self.timeout_s(wanted_timeout_s)
        self.check_model(fields.model)
        check_fields(fields, self.limits)
        if (trace := TRACE.get()) is not None:
            trace.fields = fields
        facts = self.require_facts()
        fields, prompts = await self.prompts.make(fields, facts)
        bad_words = await self.prompts.bad_words(fields)
        call = finish_call(fields, prompts, facts, self._draw_seed, bad_words)
        if call.stop:
            self.prompts.require_tokenizer("stop")
        if fields.grammar is not None:
            self.prompts.require_tokenizer(fields.grammar.field)
        return await self._begin(call, call_id, facts, started_s, deadline_s)

    async def start_reading(
        self,
        make: Callable[[ModelFacts], Awaitable[GenerateCall]],
        call_id: str,
        model: str | None,
        wanted_timeout_s: float | None = None,
    ) -> Generation:
        """Hand a call over that reads prompts and draws nothing; ``make`` validates it.

        Raises what ``start`` raises.
        """
        started_s = time.monotonic()
        deadline_s = started_s + self.timeout_s(wanted_timeout_s)
        self.check_model(model)
        facts = self.require_facts()
        return await self._begin(await make(facts), call_id, facts, started_s, deadline_s)

    async def _begin(
        self,
        call: GenerateCall,
        call_id: str,
        facts: ModelFacts,
        started_s: float,
        deadline_s: float,
    ) -> Generation:
        caller = CALLER.get()
        if caller is not None:
            caller.check_tokens(time.monotonic())
            call = replace(call, cache_salt=tenant_salt(caller.tenant, call.cache_salt))
        generation = self._admit(call, call_id, facts, started_s, deadline_s)
        if (trace := TRACE.get()) is not None:
            trace.generation = generation
        for name in filter(None, (call_id, REQUEST_ID.get())):
            self.running.add(name, generation.queue)
        try:
            await self._hand_over(generation, deadline_s)
        except BaseException:
            generation.close()
            raise
        return generation

    async def status(self) -> dict[str, Any]:
        """The cluster's state with all replicas in it, as ``status --json`` prints it."""
        found, replicas = await asyncio.gather(self.cluster.fresh(), self.peers.ask("describe"))
        snapshot = dict(found or {"state": "STARTING"})
        snapshot["schema"] = 1
        snapshot["gateway"] = [*snapshot.get("gateway", ()), *replicas.values()]
        return snapshot

    async def abort_calls(self, names: Sequence[str]) -> list[str]:
        """End calls of any replica, by the names that clients know; those that there were."""
        answers = (await self.peers.ask("abort", list(names))).values()
        return [name for name in dict.fromkeys(names) if any(name in found for found in answers)]

    async def render_metrics(self) -> bytes:
        """The exposition of all replicas and workers: each number once."""
        if self.limits.num_gateway_replicas == 1:
            await asyncio.gather(self.cluster.fresh(), self.cluster.load())
            return self.metrics.render()
        replicas, _, _ = await asyncio.gather(
            self.peers.ask("metrics"), self.cluster.fresh(), self.cluster.load()
        )
        return self.metrics.render(replicas)

    def _follow(self, snapshot: Snapshot) -> None:
        endpoints = attention_endpoints(snapshot)
        for endpoint in endpoints:
            self.metrics.engine(endpoint.engine)  # shows as 0 from the start
        self.engines.update(endpoints, drained_workers(snapshot))

    def _to_text(self, ids: Sequence[int]) -> str:
        if self.tokenizer is None:
            return " ".join(map(str, ids))
        return self.tokenizer.decode(ids, False)

    def describe(self) -> dict[str, Any]:
        """This replica's entry in the status; ``app`` fills in process id and addresses."""
        return {"name": self.name, **self.addresses}

    def require_facts(self) -> ModelFacts:
        """The served model's limits. Raises ``NotReadyError`` where nothing can be served."""
        if not self._takes_calls:
            raise _ended()
        self._check_state()
        facts = self.facts
        if facts is None:
            raise NotReadyError("no attention worker is ready", "not_ready", 2.0)
        return facts

    def _check_state(self) -> bool:
        """Whether requests can be handed over now; False while they should wait.

        Raises:
            NotReadyError: waiting would not help.
        """
        snapshot = self.cluster.snapshot
        if snapshot is None:
            raise NotReadyError("the cluster is starting", "not_ready", 2.0)
        state = snapshot["state"]
        if state == "RECOVERING":
            return False
        if state == "DRAINING":
            raise NotReadyError("the cluster is draining", "draining", 10.0)
        if state not in ("SERVING", "DEGRADED"):
            reason = f"the cluster is {state}{_because(snapshot.get('error'))}"
            raise NotReadyError(reason, "not_ready", 2.0)
        if not snapshot.get("experts_complete", True):
            raise NotReadyError("some experts are on no worker", "experts_unavailable", 5.0)
        return True

    def _admit(
        self,
        call: GenerateCall,
        call_id: str,
        facts: ModelFacts,
        started_s: float,
        deadline_s: float,
    ) -> Generation:
        if self._admission is None:
            most, workers = self.limits.max_queue, self.config.workers.num_attention_ranks
            self._admission = Admission(
                max_requests=most,
                max_tokens=self.limits.max_queue_tokens or most * facts.max_model_len,
                capacity=workers * self.config.engine.max_num_seqs,
            )
        now_s = time.monotonic()
        if self._admission.queue_time_s() > deadline_s - now_s:
            self.metrics.admission_rejections.add("deadline")
            raise DeadlineExceededError("the queue is longer than the request's time", False)
        try:
            ticket = self._admission.admit(
                len(call.prompts), call.max_total_tokens, now_s, call.num_prompt_bytes
            )
        except QueueFullError as err:
            self.metrics.admission_rejections.add(err.limit)
            raise
        return Generation(
            call,
            call_id,
            created=int(time.time()),
            queue=OutputQueue(),
            ticket=ticket,
            deadline_s=deadline_s,
            tokenizer=self.tokenizer,
            eos_token_ids=facts.eos_token_ids,
            metrics=self.metrics,
            started_s=started_s,
            admitted_s=now_s,
            caches_prefixes=self.config.engine.enable_prefix_caching,
            caller=CALLER.get(),
            on_close=self.running.remove,
        )

    async def _hand_over(self, generation: Generation, deadline_s: float) -> None:
        budget_ms = max(1, int((deadline_s - time.monotonic()) * 1000))
        for request in generation.call.requests(generation.call_id, budget_ms):
            await self._assign(request, generation, deadline_s)
        for _ in range(_TURNS_TO_LEAVE):
            await asyncio.sleep(0)
        generation.handed_over()

    async def _assign(self, request: Request, generation: Generation, deadline_s: float) -> None:
        no_stream_s: float | None = None
        while True:
            now_s = time.monotonic()
            generation.queue.check()
            can_go = self._check_state()
            if can_go:
                entry = self.engines.assign(request, generation.queue, deadline_s)
                if entry is not None:
                    generation.assigned(request.request_id, entry)
                    return
            if now_s >= deadline_s:
                if can_go:
                    raise DeadlineExceededError("the request's time is over", False)
                raise NotReadyError("the cluster is recovering", "not_ready", 2.0)
            if not can_go:
                await self.cluster.wait_change(min(_LOOK_S, deadline_s - now_s))
                continue
            no_stream_s = no_stream_s or now_s
            if now_s - no_stream_s > _STREAM_WAIT_S:
                raise NotReadyError("no attention worker is ready", "not_ready", 2.0)
            await self.engines.wait_change(min(_LOOK_S, deadline_s - now_s))

    def _observe_resubmitted(self, entry: Submission) -> None:
        cause = entry.replay_cause.value
        self.metrics.requests_replayed.add(cause)
        self.metrics.tokens_recomputed.add(cause, amount=entry.num_known_tokens)


def new_call_id(kind: CallKind) -> str:
    """Name of a call: ``cmpl-`` or ``chatcmpl-`` and 32 hex digits."""
    prefix = "chatcmpl" if kind is CallKind.CHAT else "cmpl"
    return f"{prefix}-{uuid.uuid4().hex}"


def tenant_salt(tenant: str, salt: str) -> str:
    """What a request's prefixes are cached under: nobody else's are found, nor found out."""
    return f"{tenant}\0{salt}"


def _facts(name: str, hello: EngineHello) -> ModelFacts:
    return ModelFacts(
        name=name,
        max_model_len=hello.max_model_len,
        vocab_size=hello.vocab_size,
        max_kv_tokens=hello.max_kv_tokens,
        eos_token_ids=tuple(hello.eos_token_ids),
        dtype=hello.dtype,
        model_type=hello.model_type,
        shape=_shape(hello),
        labels=tuple(hello.labels),
        pad_token_id=hello.pad_token_id if hello.HasField("pad_token_id") else None,
        problem_type=hello.problem_type,
    )


def _shape(hello: EngineHello) -> ModelShape:
    return ModelShape(
        hidden_size=hello.hidden_size,
        num_layers=hello.num_layers,
        num_heads=hello.num_heads,
        vocab_size=hello.vocab_size,
        num_labels=len(hello.labels),
        banks=tuple(
            BankShape(
                name=bank.name,
                num_experts=bank.num_experts,
                top_k=bank.top_k,
                aux_copies=bank.aux_copies,
            )
            for bank in hello.banks
        ),
    )


def _seed_source(base: int, name: str) -> Callable[[], int]:
    """Draws seeds; from a base other than 0 the same ones in every run of a replica."""
    source = random.Random(f"{base}/{name}") if base else random.SystemRandom()
    return lambda: source.getrandbits(63)


def _ended() -> NotReadyError:
    return NotReadyError("the server is about to stop", "draining", 10.0)


def _because(reason: object) -> str:
    return f": {reason}" if reason else ""
