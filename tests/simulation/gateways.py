"""Gateway processes: the product's cluster view and engine streams, and clients with requests."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

from cluster.core.errors import ExpertMeshError
from gateway.cluster.view import ClusterView, Snapshot, attention_endpoints, living_workers
from gateway.engines.engine_pool import EnginePool
from gateway.engines.submission import Submission
from tests.simulation.kernel import Kernel, Process
from tests.simulation.network import Pipe
from tests.simulation.ray import SimRay
from tests.simulation.toy_model import right_tokens
from workers.requests.request import Request, SamplingParams, TokenOutput

REQUEST_LIMIT_S = 120.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """One request of a client."""

    name: str
    gateway: int
    at_s: float
    prompt: tuple[int, ...]
    max_tokens: int
    seed: int
    cache_salt: str = ""
    abort_after: int | None = None
    """Tokens after which the client leaves."""


@dataclass(slots=True)
class Outcome:
    """What a client got."""

    ask: Ask
    tokens: list[int] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)
    """Ends that were reported; one, when all is well."""
    error: str = ""
    code: str = ""
    entry: Submission | None = None
    has_left: bool = False
    problems: list[str] = field(default_factory=list)
    """What is wrong with what came, of all clients."""
    right: list[int] = field(init=False)
    """What must come."""

    def __post_init__(self) -> None:
        ask = self.ask
        self.right = right_tokens(ask.prompt, ask.cache_salt, ask.seed, ask.max_tokens)

    @property
    def is_over(self) -> bool:
        return bool(self.ends) or self.has_left

    def put(self, output: TokenOutput) -> None:
        """``OutputSink``."""
        first = len(self.tokens)
        self.tokens += output.token_ids
        if output.finish_reason is not None:
            self.ends.append(output.finish_reason.value)
            self.error, self.code = output.error or "", output.error_code
        self._judge(first)
        limit = self.ask.abort_after
        if limit is not None and len(self.tokens) >= limit and not self.is_over:
            self.has_left = True
            assert self.entry is not None
            self.entry.abort()

    def fail(self, error: ExpertMeshError) -> None:
        """``OutputSink``."""
        self.ends.append("failed")
        self.error, self.code = str(error), getattr(error, "code", type(error).__name__)
        self._judge(len(self.tokens))

    def _judge(self, first: int) -> None:
        """Look at the tokens from ``first`` on, and at the ends."""
        name, got = self.ask.name, self.tokens
        for place in range(first, len(got)):
            if place >= len(self.right) or got[place] != self.right[place]:
                self.problems.append(f"{name}: token {place} is wrong")
                return
        if len(self.ends) > 1:
            self.problems.append(f"{name} ends twice: {self.ends}")
        elif self.ends == ["length"] and len(got) != self.ask.max_tokens:
            self.problems.append(f"{name} ends after {len(got)} of {self.ask.max_tokens} tokens")


class SimGateway:
    """One replica."""

    def __init__(self, ray: SimRay, number: int, host: str, token: str) -> None:
        self.ray, self.name = ray, f"gateway-{number}"
        kernel = ray.kernel
        self.process = Process(kernel, self.name, host, ray.new_pid())
        self._kernel: Kernel = kernel
        self.outcomes: list[Outcome] = []
        before, kernel.process = kernel.process, self.process
        self.view = ClusterView(self._find)
        self.pool = EnginePool(token, self.name)
        self.view.listen(self._follow)
        kernel.process = before
        self.process.loop.call_soon(self.view.start)

    def ask(self, ask: Ask) -> Outcome:
        """A client sends a request at its time."""
        outcome = Outcome(ask, problems=self._kernel.failures)
        self.outcomes.append(outcome)
        self._kernel.after(ask.at_s, self.process.run, self._begin, outcome)
        return outcome

    def _begin(self, outcome: Outcome) -> None:
        loop = self.process.loop
        loop.call_soon(lambda: loop.create_task(self._serve(outcome)))

    async def _serve(self, outcome: Outcome) -> None:
        ask = outcome.ask
        deadline_s = time.monotonic() + REQUEST_LIMIT_S
        request = Request(
            request_id=ask.name,
            prompt=ask.prompt,
            params=SamplingParams(max_tokens=ask.max_tokens, seed=ask.seed),
            deadline_ms=int(1000 * REQUEST_LIMIT_S),
            cache_salt=ask.cache_salt,
        )
        while (entry := self.pool.assign(request, outcome, deadline_s)) is None:
            if time.monotonic() > deadline_s:
                outcome.ends.append("no worker")
                return
            await self.pool.wait_change(0.5)
        outcome.entry = entry

    def _follow(self, snapshot: Snapshot) -> None:
        self.pool.update(attention_endpoints(snapshot), living_workers(snapshot))

    async def _find(self) -> _Calls:
        controller = self.ray.controller
        if controller is None:
            raise ConnectionError("there is no controller")
        return _Calls(self, controller)


class _Calls:
    """``ControllerCalls``: calls of the controller actor, through Ray."""

    def __init__(self, gateway: SimGateway, controller: Any) -> None:
        self._gateway, self._controller = gateway, controller

    async def ask(self, call: str, *details: Any) -> Any:
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


async def _nothing() -> None:
    await asyncio.sleep(0)
