"""The protocol-independent gateway, which starts calls. HTTP and gRPC servers make the calls.

A replica has one ``Gateway`` for each served model. The servers call the first one:
``Gateway.start`` looks up the gateway of the call's model, checks the fields, makes the engine
requests (``request_maker``), admits the call (``admission_controller``) and sends the requests to
the engines (``request_submitter``).
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

from cluster.config.cluster import ClusterConfig
from cluster.config.gateway import ShutdownStage
from cluster.core.errors import (
    ExpertMeshError,
    KeyLimitError,
    NotReadyError,
    QueueFullError,
)
from cluster.core.model_table import FIRST_REVISION
from cluster.core.release import RELEASE
from cluster.tracing import logs
from cluster.tracing.gateway_counts import GatewayCounts
from gateway.auth.auth import CALLER
from gateway.calls import request_log
from gateway.calls.admission_controller import AdmissionController
from gateway.calls.inspection_memory import InspectionMemory
from gateway.calls.model_routes import ModelRoute
from gateway.calls.output_queue import OutputQueue
from gateway.calls.prompts import PromptMaker
from gateway.calls.readiness import Readiness, shutdown_error
from gateway.calls.request_maker import MakeRequests, RequestMaker, complete_requests
from gateway.calls.request_submitter import RequestSubmitter
from gateway.calls.request_trace import TRACE, note_error
from gateway.calls.running_call import RunningCall
from gateway.calls.served_model import ServedModel
from gateway.calls.served_models import SharedParts
from gateway.calls.service_status import ServiceStatus
from gateway.calls.tenant_queues import CallDemand
from gateway.calls.tracing import start_tracing
from gateway.cluster.view import (
    Snapshot,
    SnapshotFollower,
    attention_endpoints,
    live_workers,
)
from gateway.cluster.worker_stats import WorkerStats
from gateway.core.call import CallKind, GenerateCall
from gateway.core.errors import ErrorReport, report_error
from gateway.core.field_checks import check_fields
from gateway.core.model import ModelFacts
from gateway.core.replay import ReplayCause
from gateway.core.request_id import REQUEST_ID
from gateway.core.retention import with_ttl_hint
from gateway.core.tuning import GatewayTuning
from gateway.engines.engine_pool import EnginePool
from gateway.engines.router import RoutingPolicy
from gateway.engines.submission import Submission
from gateway.observability.metrics import GatewayMetrics
from gateway.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


class Gateway:
    """One served model of a gateway replica: owns the components that serve its calls.

    Args:
        config: the cluster's configuration.
        tokenizer: tokenizer of the model; if None, prompts must be token ids.
        cluster: follows the controller.
        engines: streams to the attention workers; the gateway updates them from ``cluster``.
        name: name of this replica.
        tuning: limits and times that have no command-line option.
        shared: what the models of the replica share; None for the only model.
        revision: name of the model's revision.
    """

    def __init__(
        self,
        config: ClusterConfig,
        tokenizer: Tokenizer | None,
        cluster: SnapshotFollower,
        engines: EnginePool,
        name: str = "gateway",
        tuning: GatewayTuning | None = None,
        shared: SharedParts | None = None,
        revision: str = FIRST_REVISION,
    ) -> None:
        self.revision = revision
        self.num_calls = 0
        """Number of calls that run, or that are about to start."""
        self.config = config
        self.limits = config.gateway
        self._fingerprint = f"expertmesh-{RELEASE}-{config.fingerprint()}"
        self.tokenizer = tokenizer
        self.tuning = tuning or GatewayTuning()
        self.shared = shared = shared or SharedParts.of(config.gateway, self.tuning)
        self.keys, self.admin_keys = shared.keys, shared.admin_keys
        self.long_work, self.running = shared.long_work, shared.running
        self.state, self.disk = shared.state, shared.disk
        self.prompts = PromptMaker(
            tokenizer, config.gateway.trust_request_chat_template, self.long_work
        )
        self.cluster = cluster
        self.engines = engines
        self.name = name
        has_keys = config.gateway.requires_keys or config.gateway.requires_admin_keys
        self.numbers = WorkerStats(cluster, self.tuning.numbers_age_s if has_keys else 0.0)
        logs.CONTEXT.request_id = REQUEST_ID.get
        self.model = ServedModel(config.model.served_model_name, engines)
        metrics = GatewayMetrics(
            self.model.name,
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
            "" if revision == FIRST_REVISION else revision,
        )
        self.metrics = shared.metrics.setdefault(metrics.key, metrics)
        self.metrics.follow(lambda: self.cluster.snapshot, lambda: self.cluster.known_load)
        self.inspection_memory = InspectionMemory(self.tuning.max_inspection_bytes, self.metrics)
        """Memory of the results of all inspections, over HTTP and gRPC."""
        self.counts = GatewayCounts()
        """Request counts of all gateways, including gateways that have ended."""
        self._is_first = not shared.models
        """Whether this is the gateway of the replica's first model, which the servers call."""
        shared.models.add(self)
        self.status = ServiceStatus(
            name, config.gateway, self.numbers, self.metrics, self.model.adapters, shared
        )
        self.tracing = (
            start_tracing(
                config.observability,
                name,
                self.model.name,
                lambda: self.status.addresses,
                self.long_work,
            )
            if self._is_first
            else None
        )
        self._reporter: asyncio.Task[None] | None = None
        self.readiness = Readiness(cluster, engines, self.keys, self.tuning.leaving_lead_s)
        self.requests = RequestMaker(self.long_work, config.engine.seed, name)
        self._submitter = RequestSubmitter(
            engines, cluster, self.readiness, self.long_work, self.tuning.stream_wait_s
        )
        self._routes_by_kv = config.gateway.routing_policy == RoutingPolicy.KV.value
        seats = config.engine.max_num_seqs
        self.admission = AdmissionController(config.gateway, seats, engines, self.metrics)
        cluster.listen(self._follow)
        if self.tracing is not None:
            cluster.listen(self.tracing.see)
        engines.on_resubmit = self._observe_resubmitted

    @property
    def placement_epoch(self) -> int:
        """Placement epoch in the controller's latest snapshot; 0 before the first snapshot."""
        return int((self.cluster.snapshot or {}).get("placement_epoch") or 0)

    def serving(self, name: str | None) -> Gateway:
        """Return the gateway of a model or adapter; see ``ServedModels.find``."""
        return self.shared.models.find(name)

    def count_call(self, held: ExitStack) -> None:
        """Count a call in ``num_calls`` until ``held`` is closed."""
        self.num_calls += 1

        def end() -> None:
            self.num_calls -= 1

        held.callback(end)

    def leave(self, now_s: float) -> int:
        """Become permanently not ready; return the number of requests that still run.

        This and ``shut_down`` concern all models of the replica.
        """
        for gateway in self.shared.models:
            gateway.readiness.leave(now_s)
        return sum(gateway.admission.num_requests for gateway in self.shared.models)

    def shut_down(self, stage: ShutdownStage, now_s: float) -> int:
        """Carry out one stage of the server's shutdown; return the number of running requests.

        The replica is not ready in any stage. It refuses new calls in all stages after ``lead``,
        and ends running calls with an error in the stage ``fail``.
        """
        left = self.leave(now_s)
        if stage != "lead":
            for gateway in self.shared.models:
                gateway.readiness.accepts_calls = False
            self.shared.models.end_waits()
        if stage == "fail":
            self.running.fail(shutdown_error())
        return left

    async def close(self) -> None:
        """Stop the threads and processes that run long work, such as tokenization."""
        await self.prompts.stop()
        self.long_work.stop()

    def timeout_s(self, wanted_s: float | None) -> float:
        most = self.limits.request_timeout_s
        return most if wanted_s is None else min(wanted_s, most)

    async def start(
        self, call: GenerateCall, call_id: str, make: MakeRequests | None = None
    ) -> RunningCall:
        """Validate a call, admit it and send its requests to the engines.

        Args:
            call: the client's call.
            call_id: id of the call.
            make: validates the call and makes its requests; None makes generation requests.

        Raises:
            RequestError: the call is invalid. Subclasses give the reason.
            QueueFullError: a limit of the queue is exceeded.
            NotReadyError: the cluster cannot serve the call.
            DeadlineExceededError: the deadline passed before an engine received the call.
        """
        limit_s = self.timeout_s(call.timeout_s)
        deadline_s = time.monotonic() + limit_s
        route = self.shared.models.route_of(call.model)
        if route.is_held:
            await self._wait_released(route, limit_s)
        gateway = route.pick(call)
        with ExitStack() as held:
            gateway.count_call(held)
            adapter = gateway.model.hold_adapter(call.model, held)
            if make is None:
                check_fields(call, self.limits)
                call = with_ttl_hint(call, self.limits)
                make = partial(gateway.requests.make, call)
                if (trace := TRACE.get()) is not None:
                    trace.fields = call
            return await gateway._start(call, call_id, deadline_s, adapter, make, held)

    async def _wait_released(self, route: ModelRoute, limit_s: float) -> None:
        """Wait for the next revision of a model; counts calls that are refused."""
        if not self.readiness.accepts_calls:
            raise shutdown_error()
        try:
            await route.wait_released(limit_s, self.limits.max_queue)
        except QueueFullError as err:
            self.metrics.admission_rejections.labels(err.limit).inc()
            raise

    async def _start(
        self,
        call: GenerateCall,
        call_id: str,
        deadline_s: float,
        adapter: str,
        make: MakeRequests,
        held: ExitStack,
    ) -> RunningCall:
        """Start a call with the adapter key ``adapter``; ``make`` makes its engine requests.

        ``deadline_s``: by ``time.monotonic``. ``held`` has the resources that are released when the
        call ends.
        """
        started_s = time.monotonic()
        facts, caller = self.require_facts(), CALLER.get()
        demand = CallDemand(priority=call.priority or 0)
        if caller is not None:
            demand = replace(demand, tenant=caller.entry.tenant, weight=caller.entry.weight)
        # a full queue refuses the call before its costly tokenization
        self.admission.require_capacity(demand, facts.max_model_len, deadline_s)
        call, made = await make(facts, self.prompts)
        if not self.engines.workers.has_adapter(adapter):
            raise NotReadyError(f"no worker could load the adapter {call.model}: retry later")
        if caller is not None:
            caller.check_tokens(time.monotonic())
        requests = complete_requests(call, made, call_id, adapter, caller)
        running = RunningCall(
            replace(call, model=call.model or self.model.name),
            requests,
            call_id,
            created=int(time.time()),
            queue=OutputQueue(
                self.tuning.max_unread_bytes,
                self.tuning.unread_limit_s,
                self.running.interval_s,
            ),
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
            fingerprint=self._fingerprint,
            revision=f"{self.model.name}/{self.revision}",
        )
        running.held = held.pop_all()
        try:
            if (trace := TRACE.get()) is not None:
                trace.running, trace.model = running, self.model.name
            if (line := request_log.CURRENT.get()) is not None:
                line.running = running
            running.held.callback(self.running.remove, running.queue)
            for name in filter(None, (call_id, REQUEST_ID.get())):
                self.running.add(name, running.queue)
            await self._submitter.submit(running, self.model.hello if self._routes_by_kv else None)
        except BaseException:
            running.close()
            raise
        return running

    def report_error(self, error: Exception, request_id: str) -> ErrorReport:
        """Count, log and trace an error of a request; return the report for the client."""
        report = report_error(error, request_id)
        note_error(report.code)
        if isinstance(error, KeyLimitError):
            self.metrics.admission_rejections.labels(error.limit).inc()
        if not isinstance(error, ExpertMeshError):
            logger.error("request %s failed", request_id, exc_info=error)
        return report

    def _follow(self, snapshot: Snapshot) -> None:
        if self._is_first:
            logs.CONTEXT.generation = int(snapshot.get("generation") or 0)
        self.model.adapters.follow(snapshot)
        endpoints = attention_endpoints(snapshot)
        for endpoint in endpoints:
            self.metrics.engine(endpoint.engine)  # creates the series with value 0
        self.engines.update(endpoints, live_workers(snapshot))
        if self.engines.pauses.change(int(snapshot.get("generation") or 0), time.monotonic()):
            reports = self.cluster.report_pauses(self.engines.pauses.take)
            self._reporter = asyncio.create_task(reports)

    def require_facts(self) -> ModelFacts:
        """Return the limits of the served model. Raises ``NotReadyError`` if no call can start."""
        self.readiness.require_serving()
        return self.model.require_facts()

    def _observe_resubmitted(self, entry: Submission) -> None:
        cause, is_moved = entry.replay_cause.value, entry.replay_cause is ReplayCause.MOVED
        self.metrics.requests_replayed.labels(cause).inc()
        num_tokens = entry.missing_tokens if is_moved else entry.num_known_tokens
        self.metrics.tokens_recomputed.labels(cause).inc(num_tokens)


def new_call_id(kind: CallKind) -> str:
    """Return a new call id: ``chatcmpl-`` for a chat or else ``cmpl-``, and 32 hex digits."""
    prefix = "chatcmpl" if kind is CallKind.CHAT else "cmpl"
    return f"{prefix}-{uuid.uuid4().hex}"
