"""Messages of an attention worker to gateways."""

from __future__ import annotations

import time
from collections.abc import Iterable

from cluster.core.errors import ExpertMeshError, QueueFullError
from workers.engine.engine import Engine
from workers.kv.block_pool import HashChanges
from workers.process.engine_server import EngineServer
from workers.process.intake.solo_steps import SoloStepReporter
from workers.process.step_messages import step_messages
from workers.requests.request import Queued, Request, StepOutput, TokenOutput
from workers.requests.sequence import Failure, failed_output
from workers.requests.wire import KvPressure, Paused, Prefetched

_PRESSURE_INTERVAL_S = 0.1
"""Minimum time between two messages that ask a gateway to move a request."""


class GatewayOutputs:
    """Records which gateway owns each request in the engine, and sends it the request's messages.

    Call the methods on the engine's thread only.
    """

    def __init__(self, engine: Engine, stream: EngineServer) -> None:
        self._engine = engine
        self._stream = stream
        self.owners: dict[str, str] = {}
        """Owning gateway by request id, for the requests in the engine."""
        self.solo_steps = SoloStepReporter(engine, stream.publish)
        self._pressure_reported_at = 0.0
        """Monotonic time of the last message that asked a gateway to move a request."""

    def accept(self, gateway: str, request: Request) -> None:
        """Record that the engine has a request, and report this to the gateway."""
        self.owners[request.request_id] = gateway
        queued = Queued(request_id=request.request_id, attempt=request.attempt)
        self._stream.publish(gateway, queued)

    def refuse(self, gateway: str, request: Request, err: ExpertMeshError) -> None:
        """End every choice of a refused request with the error."""
        code = "queue_full" if isinstance(err, QueueFullError) else getattr(err, "code", "")
        failure = Failure(str(err), code, getattr(err, "param", None))
        outputs = tuple(
            failed_output(request, choice, failure) for choice in range(max(request.n, 1))
        )
        self._stream.publish(gateway, StepOutput(outputs=outputs))

    def emit(self, outputs: Iterable[TokenOutput]) -> None:
        """Send each gateway the outputs of its requests."""
        outputs = tuple(outputs)
        for gateway, message in step_messages(outputs, self.owners):
            self._stream.publish(gateway, message)
        for output in outputs:
            if output.finish_reason is not None:
                self.forget_ended(output.request_id)

    def publish_prefetched(self, answers: Iterable[tuple[str, Prefetched]]) -> None:
        """Report completed prefetches to the gateways that requested them."""
        for gateway, answer in answers:
            self._stream.publish(gateway, answer)

    def publish_kv(self, changes: HashChanges, fetch_cost: float) -> None:
        """Send changes of cached blocks, and the cost of a fetch, to all gateways."""
        self._stream.publish_kv(changes, fetch_cost, self._engine.pool.num_free)

    def report_paused(self) -> list[str]:
        """Report newly paused requests to their gateways, after the last outputs of the requests;
        return their ids.
        """
        paused = self._engine.requests.take_paused()
        for request_id in paused:
            self._stream.publish(self.owners[request_id], Paused(request_id=request_id))
            self._stream.release()
        return paused

    def report_kv_pressure(self) -> None:
        """Ask a gateway to move a request to another worker before it must be preempted here."""
        request, now = self._engine.preemption_candidate(), time.monotonic()
        if request is None or now < self._pressure_reported_at + _PRESSURE_INTERVAL_S:
            return
        owner = self.owners.get(request.request_id)
        if owner is not None:
            self._pressure_reported_at = now
            message = KvPressure(request_id=request.request_id, attempt=request.attempt)
            self._stream.publish(owner, message)

    def forget_ended(self, request_id: str) -> None:
        """Remove the owner of a request if it has ended."""
        if request_id not in self._engine.requests:
            self.owners.pop(request_id, None)

    def drop_gateway(self, gateway: str) -> None:
        """End the requests of a lost gateway."""
        for request_id in [r for r, owner in self.owners.items() if owner == gateway]:
            self._engine.abort(request_id)
            del self.owners[request_id]
        self.solo_steps.drop_gateway(gateway)
