"""Gateway processes, behind their codecs, and clients with requests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import Any

from cluster.config.cluster import ClusterConfig
from cluster.core.errors import ExpertMeshError, ModelNotFoundError, NotReadyError, QueueFullError
from gateway.calls.gateway import Gateway
from gateway.calls.output_queue import OutputQueue
from gateway.calls.prompts import PromptMaker
from gateway.calls.running_call import RunningCall
from gateway.cluster.view import SnapshotFollower
from gateway.core.call import CallKind, GenerateCall
from gateway.core.model import ModelFacts
from gateway.engines.engine_pool import EnginePool
from tests.simulation.asks import Ask
from tests.simulation.kernel import Kernel, Process
from tests.simulation.network import Pipe
from tests.simulation.outcomes import Outcome
from tests.simulation.ray import SimRay
from tests.simulation.toy_text import ToyTokenizer
from workers.requests.request import Request, TokenOutput

_RETRY_S = 0.5
"""Time after which a client asks again that was told to."""

_TOKENIZER: Any = ToyTokenizer()
_OUTCOME: ContextVar[Outcome] = ContextVar("outcome")
"""Of the call that begins."""


class WatchedQueue(OutputQueue):
    """The queue of a call, which shows all that comes."""

    def __init__(self, max_bytes: int, limit_s: float, interval_s: Callable[[], float]) -> None:
        super().__init__(max_bytes, limit_s, interval_s)
        self._outcome = _OUTCOME.get()

    def put(self, output: TokenOutput) -> None:
        self._outcome.put(output)
        super().put(output)

    def fail(self, error: ExpertMeshError) -> None:
        self._outcome.fail(error)
        super().fail(error)


class SimGateway:
    """One replica."""

    def __init__(self, ray: SimRay, name: str, host: str, config: ClusterConfig) -> None:
        self.ray, self.name = ray, name
        kernel = ray.kernel
        ray.nodes.add(host)
        self.process = Process(kernel, self.name, host, ray.actors.new_pid())
        self._kernel: Kernel = kernel
        self.outcomes: list[Outcome] = []
        self.on_over: Callable[[Outcome], None] = lambda outcome: None
        """Called at the end of each request, in this process."""
        before, kernel.process = kernel.process, self.process
        if kernel.state is not None:
            kernel.state.may_block = self.process
            self.process.on_death.append(partial(kernel.state.close_of, self.process))
        view, engines = SnapshotFollower(self._find), EnginePool(config.cluster_token, self.name)
        self._gateway = Gateway(config, _TOKENIZER, view, engines, self.name)
        kernel.process = before
        if kernel.state is not None:
            kernel.state.may_block = None
        self.process.loop.call_soon(view.start)

    def ask(self, ask: Ask) -> Outcome:
        """A client sends a request at its time."""
        outcome = Outcome(ask, self._kernel.now + ask.at_s, problems=self._kernel.failures)
        self.outcomes.append(outcome)
        self._kernel.after(ask.at_s, self.process.run, self._begin, outcome)
        return outcome

    def _begin(self, outcome: Outcome) -> None:
        loop = self.process.loop
        loop.call_soon(lambda: loop.create_task(self._serve(outcome)))

    async def _serve(self, outcome: Outcome) -> None:
        deadline_s = time.monotonic() + outcome.ask.limit_s
        error = None
        try:
            with await self._start(outcome, deadline_s) as generation:
                while not outcome.has_left and (deltas := await generation.next()):
                    outcome.take(deltas)
        except ExpertMeshError as err:
            error = err
        outcome.finish(error, time.monotonic(), deadline_s)
        self.on_over(outcome)

    async def _start(self, outcome: Outcome, deadline_s: float) -> RunningCall:
        """Begin a call, again if the cluster cannot serve it now."""
        ask = outcome.ask
        _OUTCOME.set(outcome)
        requests = [Request(prompt=ask.prompt, params=ask.params(), tenant=ask.cache_salt)]

        async def make(
            facts: ModelFacts, prompt_maker: PromptMaker
        ) -> tuple[GenerateCall, list[Request]]:
            return call, requests

        while True:
            left_s = deadline_s - time.monotonic()
            call = GenerateCall(
                kind=CallKind.COMPLETION,
                token_ids_only=not ask.stop,
                stop=ask.stop,
                model=ask.adapter or None,
                timeout_s=max(left_s, 0.0),
                n=ask.num_choices,
                session_id=ask.session or None,
                cache_salt=ask.cache_salt,
            )
            try:
                return await self._gateway.start(call, ask.name, make)
            except (NotReadyError, ModelNotFoundError, QueueFullError):
                if left_s <= 0:
                    raise
            await asyncio.sleep(_RETRY_S)

    async def _find(self) -> _Calls:
        controller = self.ray.controller
        if controller is None:
            raise ConnectionError("there is no controller")
        return _Calls(self, controller)


class _Calls:
    """``ControllerCalls``: calls of the controller actor, through Ray."""

    def __init__(self, gateway: SimGateway, controller: Any) -> None:
        self._gateway, self._controller = gateway, controller

    async def call(self, call: str, *details: Any) -> Any:
        net, caller = self._gateway.ray.net, self._gateway.process
        target = self._controller.process
        loop = caller.loop
        answer = loop.create_future()
        there, back = Pipe(net, caller.host, target.host), Pipe(net, target.host, caller.host)

        def settle(result: Any, error: BaseException | None) -> None:
            if not answer.done():
                if error is not None:
                    answer.set_exception(error)
                else:
                    answer.set_result(result)

        def reply(result: Any, error: BaseException | None = None) -> None:
            back.send(caller.run, loop.call_soon, settle, result, error)

        async def run() -> None:
            try:
                reply(await getattr(self._controller.actor, call)(*details))
            except ExpertMeshError as err:
                reply(None, err)

        def arrive() -> None:
            if target.is_dead:
                reply(None, ConnectionError("the controller is gone"))
            else:
                target.on_death.append(lambda: reply(None, ConnectionError("it is gone")))
                target.run(target.loop.call_soon, lambda: target.loop.create_task(run()))

        there.send(arrive)
        return await answer
