"""The stream between a gateway and an engine in the same process."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor

from cluster.core.errors import ExpertMeshError
from gateway.cluster.view import AttentionEndpoint
from gateway.core.errors import report_error
from gateway.engines.engine_stream import EngineStream, StreamEnd
from workers.engine.embedded import EmbeddedEngine
from workers.requests.request import Request, StepOutput, TokenOutput
from workers.requests.sequence import Failure, failed_output
from workers.requests.wire import Abort, FromEngine, ToEngine

logger = logging.getLogger(__name__)


class EmbeddedStream(EngineStream):
    """Runs an engine in a thread and exchanges messages with it in memory.

    Args:
        endpoint: name of the engine.
        engine: the engine; no other stream may use it.
        thread: an executor with one thread, which runs the steps.
    """

    def __init__(
        self, endpoint: AttentionEndpoint, engine: EmbeddedEngine, thread: Executor
    ) -> None:
        super().__init__(endpoint, token="", gateway="")
        self._engine = engine
        self._thread = thread
        self._arrived: list[ToEngine] = []
        self._wake = asyncio.Event()
        self._requests: dict[str, Request] = {}

    def send(self, message: ToEngine) -> None:
        self._arrived.append(message)
        self._wake.set()

    async def run(self, take: Callable[[FromEngine], Awaitable[None]]) -> StreamEnd:
        """Run steps while there are requests, and pass outputs to ``take``, until cancelled."""
        self.hello = self._engine.describe(self.endpoint.name)
        self.connected.set()
        loop = asyncio.get_running_loop()
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._arrived or self._engine.engine.has_work:
                arrived, self._arrived = self._arrived, []
                outputs = await loop.run_in_executor(self._thread, self._step, arrived)
                await take(StepOutput(outputs=tuple(outputs)))

    def _step(self, arrived: Sequence[ToEngine]) -> list[TokenOutput]:
        """Apply messages and run one step. If the step fails, all requests end with its error."""
        outputs: list[TokenOutput] = []
        for message in arrived:
            if isinstance(message, Request):
                self._requests[message.request_id] = message
                try:
                    self._engine.add_request(message)
                except Exception as err:
                    outputs += self._fail(message, err)
            elif isinstance(message, Abort):
                self._engine.engine.abort(message.request_id, message.choices)
        try:
            if self._engine.engine.has_work:
                outputs += self._engine.step()
        except Exception as err:  # all requests get the error; later ones can run
            logger.exception("an engine step failed")
            for request in list(self._requests.values()):
                outputs += self._fail(request, err)
        held = self._engine.engine.requests
        self._requests = {name: one for name, one in self._requests.items() if name in held}
        return outputs

    def _fail(self, request: Request, error: Exception) -> list[TokenOutput]:
        self._engine.engine.abort(request.request_id)
        del self._requests[request.request_id]
        report = report_error(error)
        message = report.message if isinstance(error, ExpertMeshError) else repr(error)
        failure = Failure(message, report.code, report.param)
        return [failed_output(request, choice, failure) for choice in range(request.n)]
