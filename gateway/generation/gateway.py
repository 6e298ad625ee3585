"""The gateway behind both codecs: validated calls in, running calls out.

``Gateway.start`` is the life of a request up to the engine: validate, tokenize, admit, pick a
worker, hand over. HTTP and gRPC are two thin codecs over it.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

from msgspec import structs

from cluster.config.cluster import ClusterConfig
from cluster.config.gateway import ShutdownStage
from cluster.core.errors import (
    DeadlineExceededError,
    ExpertMeshError,
    KeyLimitError,
    ModelNotFoundError,
    NotReadyError,
)
from cluster.disk.threads import DiskThreads
from cluster.tracing import logs
from cluster.tracing.gateway_counts import GatewayCounts
from gateway.auth.adapter_catalog import AdapterCatalog
from gateway.auth.auth import CALLER, is_operator, make_key_rings
from gateway.auth.key_limits import KeyUsage
from gateway.cluster.client_view import client_status
from gateway.cluster.numbers import ClusterNumbers
from gateway.cluster.serve_replicas import ReplicaAnswers, ServeReplicas
from gateway.cluster.view import (
    ClusterView,
    Snapshot,
    attention_endpoints,
    living_workers,
)
from gateway.core.call import CallKind, GenerateCall
from gateway.core.errors import ErrorReport, StorageTimeoutError, report_error
from gateway.core.field_checks import check_fields
from gateway.core.model import ModelFacts, model_facts
from gateway.core.replay import ReplayCause
from gateway.core.request_id import REQUEST_ID
from gateway.core.retention import with_hint
from gateway.core.tuning import GatewayTuning
from gateway.engines.engine_pool import EnginePool
from gateway.engines.router import RoutingPolicy
from gateway.engines.submission import Submission
from gateway.generation import request_log
from gateway.generation.admission_controller import AdmissionController
from gateway.generation.output_queue import CallRegistry, OutputQueue
from gateway.generation.prompts import PromptMaker
from gateway.generation.readiness import check_serving, server_ends, unready_reasons
from gateway.generation.request_trace import TRACE, note_error, traced
from gateway.generation.running_call import RunningCall
from gateway.generation.tenant_queues import CallDemand
from gateway.generation.tracing import start_tracing
from gateway.generation.validate import make_requests
from gateway.observability.metrics import GatewayMetrics
from gateway.observability.samples import TOTALS, SampleRing, total
from gateway.offload.long_work import LongWork
from gateway.state.store import StateStore, open_store
from gateway.text.tokenizer import Tokenizer
from workers.requests.block_hash import BlockHash, block_hashes
from workers.requests.request import Request
from workers.requests.wire import EngineHello

logger = logging.getLogger(__name__)
Requests: TypeAlias = Sequence[Request]
MakeRequests: TypeAlias = Callable[[ModelFacts], Awaitable[tuple[GenerateCall, Requests]]]
"""Validates a call against the served model: the call with what its prompts say of the answer, and
its requests, one a prompt."""

_LOOK_S = 0.5
"""Interval at which a request that waits for a worker checks whether its call was ended."""

_REQUESTS_PER_PASS = 32
"""Requests of one call that are routed in one pass of the event loop."""
_PASSES_TO_SEND = 2
"""Passes of the event loop in which a request is written to its worker's stream. The codec's next
work takes as long as a network hop, and the engine need not wait for it."""


class Gateway:
    """One replica.

    Args:
        config: the cluster's configuration.
        tokenizer: None where the checkpoint has none: prompts must be token ids then.
        cluster: follows the controller.
        engines: streams to the attention workers; fed from ``cluster`` here.
        name: of this replica.
        tuning: limits and waits that no option sets.
        state: None opens the one of the configuration, on the thread of the caller.
    """

    def __init__(
        self,
        config: ClusterConfig,
        tokenizer: Tokenizer | None,
        cluster: ClusterView,
        engines: EnginePool,
        name: str = "gateway",
        tuning: GatewayTuning | None = None,
        state: StateStore | None = None,
    ) -> None:
        self.config = config
        self.limits = config.gateway
        self.tokenizer = tokenizer
        self.long_work = LongWork()
        self.prompts = PromptMaker(
            tokenizer, config.gateway.trust_request_chat_template, self.long_work
        )
        self.cluster = cluster
        self.engines = engines
        self.name = name
        self.tuning = tuning or GatewayTuning()
        self.keys, self.admin_keys = make_key_rings(config.gateway)
        has_keys = config.gateway.asks_for_keys or config.gateway.asks_for_admin_keys
        self.numbers = ClusterNumbers(cluster, self.tuning.numbers_age_s if has_keys else 0.0)
        self.state = open_store(config.gateway) if state is None else state
        """What is kept for clients between requests; None keeps nothing."""
        self.disk = DiskThreads(
            "the state folder",
            self.tuning.disk_threads,
            self.tuning.disk_max_waiting,
            self.tuning.disk_limit_s,
            StorageTimeoutError,
        )
        """Threads of requests that use ``state``."""
        logs.CONTEXT.request_id = REQUEST_ID.get
        self.model_name = config.model.served_model_name
        self.adapters = AdapterCatalog()
        self.created = int(time.time())
        self.addresses: dict[str, Any] = {}
        self.running = CallRegistry()
        self.metrics = GatewayMetrics(
            self.model_name,
            lambda: self.cluster.snapshot,
            {
                "block_size": str(config.engine.block_size_tokens),
                "cache_dtype": config.engine.kv_cache_dtype,
                "enable_prefix_caching": str(config.engine.enable_prefix_caching),
            },
            lambda: self.cluster.known_load,
            config.gateway.metrics_all_experts,
            config.gateway.metrics_prefix,
            config.gateway.vllm_metric_names,
        )
        self.samples = SampleRing()
        self.counts = GatewayCounts()
        """Of this gateway and of others, also of those that have ended."""
        self.answers = ReplicaAnswers(
            name,
            {
                "describe": self.describe,
                "metrics": self.metrics.own_families,
                "summary": self.summary,
                "samples": self.samples.after,
                "abort": self.running.abort,
                "adapters": lambda: self.adapters.keys,
            },
        )
        self.replicas: ServeReplicas = self.answers
        self.tracing = start_tracing(
            config.observability, name, self.model_name, lambda: self.addresses, self._to_text
        )
        self._reporter: asyncio.Task[None] | None = None
        self._leaves_since_s: float | None = None
        self._takes_calls = True
        seats = config.engine.max_num_seqs
        self.admission = AdmissionController(config.gateway, seats, engines, self.metrics)
        self._hello: EngineHello | None = None
        self._facts: ModelFacts | None = None
        self._draw_seed = _seed_source(config.engine.seed, name)
        cluster.listen(self._follow)
        if self.tracing is not None:
            cluster.listen(self.tracing.see)
        engines.on_resubmit = self._observe_resubmitted

    @property
    def facts(self) -> ModelFacts | None:
        """The served model's limits; None until a worker has reported them."""
        hello = next((client.hello for client in self.engines.clients), None)
        if hello is not None and hello is not self._hello:
            self._hello, self._facts = hello, model_facts(self.model_name, hello)
        return self._facts

    @property
    def placement_epoch(self) -> int:
        """Epoch of the placement in force, by the latest snapshot."""
        return int((self.cluster.snapshot or {}).get("placement_epoch") or 0)

    @property
    def is_leaving(self) -> bool:
        """Whether the gateway is about to stop; it still serves requests that arrive."""
        return self._leaves_since_s is not None

    def leave(self, now_s: float) -> int:
        """Never be ready again; returns the number of requests that still run here."""
        if self._leaves_since_s is None:
            self._leaves_since_s = now_s
        return self.admission.num_requests

    def end(self, stage: ShutdownStage, now_s: float) -> int:
        """End with the whole server, by stages; returns the number of requests that still run."""
        left = self.leave(now_s)
        if stage != "lead":
            self._takes_calls = False
        if stage == "fail":
            self.running.fail(server_ends())
        return left

    async def close(self) -> None:
        """End its thread and process for long work."""
        await self.prompts.stop()
        self.long_work.stop()

    def has_left(self, now_s: float) -> bool:
        """Whether load balancers had ``leaving_lead_s`` to notice that the gateway leaves."""
        since_s = self._leaves_since_s
        return since_s is not None and now_s >= since_s + self.tuning.leaving_lead_s

    def not_ready_reasons(self, is_whole: bool = True) -> list[str]:
        """Why new requests cannot be served now; empty when they can.

        Without ``is_whole`` as a client's key shows it.
        """
        if self.is_leaving:
            return ["this gateway is about to stop"]
        reasons = unready_reasons(self.cluster.snapshot, self.cluster.refusal, is_whole)
        if self.cluster.snapshot is not None and not self.engines.clients:
            reasons.append("no attention worker has an open stream")
        return reasons

    def check_model(self, name: str | None) -> None:
        """Raise ``ModelNotFoundError`` unless the name (None: any) is the served model's, or an
        adapter's."""
        self.adapter_of(name)

    def adapter_of(self, name: str | None) -> str:
        """Key of the adapter that a request names as its model; empty for the served model.

        Raises ``ModelNotFoundError``.
        """
        if name is None or name == self.model_name:
            return ""
        if (key := self.adapters.find(name)) is None:
            raise ModelNotFoundError(f"the model {name[:128]!r} does not exist")
        return key

    def timeout_s(self, wanted_s: float | None) -> float:
        most = self.limits.request_timeout_s
        return most if wanted_s is None else min(wanted_s, most)

    async def start(self, call: GenerateCall, call_id: str) -> RunningCall:
        """Validate a call and hand it to the engines.

        Raises:
            RequestError: it is wrong (and its subclasses).
            QueueFullError: too much is going on.
            NotReadyError: the cluster cannot serve it.
            DeadlineExceededError: its time was over before an engine had it.
        """
        with ExitStack() as held:
            adapter = self._hold_adapter(call.model, held)
            check_fields(call, self.limits)
            call = with_hint(call, self.limits)
            if (trace := TRACE.get()) is not None:
                trace.fields = call
            return await self._start(call, call_id, adapter, partial(self._make, call), held)

    async def start_call(self, call: GenerateCall, call_id: str, make: MakeRequests) -> RunningCall:
        """Hand a call to the engines that ``make`` validates. Raises what ``start`` raises."""
        with ExitStack() as held:
            adapter = self._hold_adapter(call.model, held)
            return await self._start(call, call_id, adapter, make, held)

    def _hold_adapter(self, model: str | None, held: ExitStack) -> str:
        """Key of the adapter that a call names, which stays loaded until ``held`` is closed."""
        adapter = self.adapter_of(model)
        self.adapters.begin(held, adapter)
        held.callback(self.adapters.end, held)
        return adapter

    async def _make(self, call: GenerateCall, facts: ModelFacts) -> tuple[GenerateCall, Requests]:
        complete, prompts = await self.prompts.make(call, facts)
        bad_words = await self.prompts.bad_words(complete)
        size = sum(map(len, prompts)) + len(complete.allowed_token_ids or ())
        requests = await self.long_work.run(
            size, make_requests, complete, prompts, facts, self._draw_seed, bad_words
        )
        if complete.stop:
            self.prompts.require_tokenizer("stop")
        if complete.grammar is not None:
            self.prompts.require_tokenizer(complete.grammar.field)
        return complete, requests

    async def _start(
        self,
        call: GenerateCall,
        call_id: str,
        adapter: str,
        make: MakeRequests,
        held: ExitStack,
    ) -> RunningCall:
        """``held``: closed at the end of the call."""
        started_s = time.monotonic()
        deadline_s = started_s + self.timeout_s(call.timeout_s)
        facts, caller = self.require_facts(), CALLER.get()
        demand = CallDemand(priority=call.priority or 0)
        if caller is not None:
            demand = replace(demand, tenant=caller.entry.tenant, weight=caller.entry.weight)
        # what cannot enter is refused before it costs a tokenization
        self.admission.require_room(demand, facts.max_model_len, deadline_s)
        call, made = await make(facts)
        if not self.engines.workers.has_adapter(adapter):
            raise NotReadyError(f"no worker could load the adapter {call.model}: ask again later")
        if caller is not None:
            caller.check_tokens(time.monotonic())
        requests = complete_requests(call, made, call_id, adapter, caller)
        running = RunningCall(
            replace(call, model=call.model or self.model_name),
            requests,
            call_id,
            created=int(time.time()),
            queue=OutputQueue(self.tuning.max_unread_bytes, self.tuning.unread_limit_s),
            ticket=self.admission.admit(CallDemand.of(requests), facts.max_model_len, deadline_s),
            deadline_s=deadline_s,
            tokenizer=self.tokenizer,
            eos_token_ids=facts.eos_token_ids,
            metrics=self.metrics,
            started_s=started_s,
            admitted_s=time.monotonic(),
            caches_prefixes=self.config.engine.enable_prefix_caching,
            caller=caller,
            free=self.long_work.free,
        )
        running.held = held.pop_all()
        try:
            if (trace := TRACE.get()) is not None:
                trace.running = running
            if (line := request_log.CURRENT.get()) is not None:
                line.running = running
            running.held.callback(self.running.remove, running.queue)
            for name in filter(None, (call_id, REQUEST_ID.get())):
                self.running.add(name, running.queue)
            await self._hand_over(running)
        except BaseException:
            running.close()
            raise
        return running

    def report_error(self, error: Exception, request_id: str) -> ErrorReport:
        """``error`` as the client sees it: counted, logged and noted in the request's trace."""
        report = report_error(error, request_id)
        note_error(report.code)
        if isinstance(error, KeyLimitError):
            self.metrics.admission_rejections.labels(error.limit).inc()
        if not isinstance(error, ExpertMeshError):
            logger.error("request %s failed", request_id, exc_info=error)
        return report

    async def status(self, is_whole: bool = True) -> dict[str, Any]:
        """The cluster's state with all replicas in it, as ``status --json`` prints it.

        Without ``is_whole`` as a client's key shows it.
        """
        found, replicas = await asyncio.gather(
            self.numbers.snapshot(), self.replicas.ask("describe")
        )
        return self.status_of(found, replicas.values(), is_whole)

    def status_of(
        self,
        snapshot: Snapshot | None,
        replicas: Iterable[Mapping[str, Any]],
        is_whole: bool = True,
    ) -> dict[str, Any]:
        """The status, of a snapshot and of what replicas answered to ``describe``.

        Without adapters that the caller may not use.
        """
        status = self.adapters.without_others(snapshot or {"state": "STARTING"})
        status |= {"schema": 1, "gateway": list(replicas)}
        return status if is_whole else client_status(status, not self.limits.asks_for_admin_keys)

    async def abort_calls(self, names: Sequence[str]) -> list[str]:
        """End calls of any replica by their clients' names; returns the names that were found."""
        answers = (await self.replicas.ask("abort", list(names))).values()
        return [name for name in dict.fromkeys(names) if any(name in found for found in answers)]

    async def render_metrics(self, is_whole: bool = True) -> bytes:
        """The exposition of all replicas and workers: each number once.

        Without ``is_whole`` as a client's key shows it; without series that name adapters that the
        caller may not use.
        """
        replicas = None
        if self.limits.num_gateway_replicas == 1:
            await self.numbers.refresh()
        else:
            replicas, _ = await asyncio.gather(self.replicas.ask("metrics"), self.numbers.refresh())
        return self.adapters.without_series_of_others(self.metrics.render(replicas, is_whole))

    def _follow(self, snapshot: Snapshot) -> None:
        logs.CONTEXT.generation = int(snapshot.get("generation") or 0)
        self.adapters.follow(snapshot)
        endpoints = attention_endpoints(snapshot)
        for endpoint in endpoints:
            self.metrics.engine(endpoint.engine)  # shows as 0 from the start
        self.engines.update(endpoints, living_workers(snapshot))
        if self.engines.pauses.change(int(snapshot.get("generation") or 0), time.monotonic()):
            reports = self.cluster.report_pauses(self.engines.pauses.take)
            self._reporter = asyncio.create_task(reports)

    def _to_text(self, ids: Sequence[int]) -> str:
        if self.tokenizer is None:
            return " ".join(map(str, ids))
        return self.tokenizer.decode(ids, False)

    def describe(self) -> dict[str, Any]:
        """This replica's entry in the status; ``app`` fills in process id and addresses."""
        return {"name": self.name, **self.addresses}

    def summary(self) -> dict[str, Any]:
        """What ``describe`` says, start and totals of this replica."""
        families = self.metrics.own_samples(TOTALS)
        totals = {name: total(families, name) for name in TOTALS}
        return {"describe": self.describe(), "totals": totals, "created": self.created}

    def require_facts(self) -> ModelFacts:
        """The served model's limits. Raises ``NotReadyError`` where nothing can be served."""
        if not self._takes_calls:
            raise server_ends()
        self._check_serving()
        facts = self.facts
        if facts is None:
            raise NotReadyError("no attention worker is ready", "not_ready", 2.0)
        return facts

    def _check_serving(self) -> bool:
        """See ``check_serving``; errors say what the caller may see."""
        is_whole = is_operator(self.keys)
        return check_serving(self.cluster.snapshot, self.cluster.refusal, is_whole)

    async def _hand_over(self, running: RunningCall) -> None:
        requests = running.requests
        num_tokens = sum(len(request.prompt) for request in requests)
        hashes = await self.long_work.run(num_tokens, self._name_blocks, requests)
        for place, (request, names) in enumerate(zip(requests, hashes, strict=True), 1):
            await self._assign(traced(request), running, names)
            if not place % _REQUESTS_PER_PASS:
                await asyncio.sleep(0)
        for _ in range(_PASSES_TO_SEND):
            await asyncio.sleep(0)
        running.handed_over()

    def _name_blocks(self, requests: Sequence[Request]) -> list[Sequence[BlockHash]]:
        """Hashes of the KV blocks of each prompt, where requests are routed by them."""
        hello = self._hello
        if self.limits.routing_policy != RoutingPolicy.KV.value or hello is None:
            return [() for _ in requests]
        size, limit = hello.kv_block_size, hello.kv_length_matters_above
        return [block_hashes(one, size, limit) if size else () for one in requests]

    async def _assign(
        self, request: Request, running: RunningCall, hashes: Sequence[BlockHash]
    ) -> None:
        deadline_s = running.deadline_s
        no_stream_s: float | None = None
        while True:
            now_s = time.monotonic()
            running.queue.check()
            can_go = self._check_serving()
            if can_go:
                entry = self.engines.assign(request, running.queue, deadline_s, hashes)
                if entry is not None:
                    running.assigned(request.request_id, entry)
                    return
            if now_s >= deadline_s:
                waited = "" if can_go else ": the cluster is recovering"
                raise DeadlineExceededError(f"the request's time is over{waited}", False)
            if not can_go:
                await self.cluster.wait_change(min(_LOOK_S, deadline_s - now_s))
                continue
            no_stream_s = no_stream_s or now_s
            if now_s - no_stream_s > self.tuning.stream_wait_s:
                raise NotReadyError("no attention worker is ready", "not_ready", 2.0)
            await self.engines.wait_change(min(_LOOK_S, deadline_s - now_s))

    def _observe_resubmitted(self, entry: Submission) -> None:
        cause, is_moved = entry.replay_cause.value, entry.replay_cause is ReplayCause.MOVED
        self.metrics.requests_replayed.labels(cause).inc()
        num_tokens = entry.missing_tokens if is_moved else entry.num_known_tokens
        self.metrics.tokens_recomputed.labels(cause).inc(num_tokens)


def new_call_id(kind: CallKind) -> str:
    """Name of a call: ``cmpl-`` or ``chatcmpl-`` and 32 hex digits."""
    prefix = "chatcmpl" if kind is CallKind.CHAT else "cmpl"
    return f"{prefix}-{uuid.uuid4().hex}"


def complete_requests(
    call: GenerateCall,
    requests: Requests,
    call_id: str,
    adapter: str,
    caller: KeyUsage | None,
) -> Requests:
    """The requests of a call, named ``call_id``-i, with what they do not have from their prompts.

    Args:
        call: the checked call.
        requests: one a prompt.
        call_id: name of the call.
        adapter: key of the adapter that it names; empty for the served model itself.
        caller: whose it is; None without keys.
    """
    shared: dict[str, Any] = {
        "n": call.num_drawn,
        "priority": call.priority or 0,
        "cache_salt": call.cache_salt or "",
        "session": call.session,
        "cache_ttl_s": call.cache_ttl,
        "adapter": adapter,
    }
    if caller is not None:
        shared |= {"tenant": caller.entry.tenant, "weight": caller.entry.weight}
        # No other tenant finds, or can detect, the cached prefixes of this salt.
        shared["cache_salt"] = f"{shared['tenant']}\0{shared['cache_salt']}"
    return [
        structs.replace(request, request_id=f"{call_id}-{index}", **shared)
        for index, request in enumerate(requests)
    ]


def _seed_source(base: int, name: str) -> Callable[[], int]:
    """Draws seeds; from a base other than 0 the same ones in every run of a replica."""
    source = random.Random(f"{base}/{name}") if base else random.SystemRandom()
    return lambda: source.getrandbits(63)
