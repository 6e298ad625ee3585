"""All streams of this replica: one to each attention worker of the current generation."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.errors import NotReadyError
from gateway.cluster_view import AttentionEndpoint
from gateway.engine_client import PING_S, SILENCE_LIMIT_S, EngineClient, OutputSink, Submission
from gateway.router import RoutingPolicy, WorkerLoad, pick_worker
from workers.request import Request

logger = logging.getLogger(__name__)

_RETRY_S = 0.2


@dataclass(frozen=True, slots=True)
class Assignment:
    """A request in the hands of an engine."""

    client: EngineClient
    """The stream it went over."""
    request_id: str
    """The request."""

    def abort(self, choices: Sequence[int] = ()) -> None:
        """End it, or some of its choices; never waits, does no harm after the end."""
        self.client.abort(self.request_id, choices)


class EnginePool:
    """Keeps the streams and hands requests to them.

    Args:
        token: the cluster token.
        gateway: name of this replica.
        policy: how a worker is picked.
        silence_limit_s: see ``EngineClient``.
        ping_s: see ``EngineClient``.
    """

    def __init__(
        self,
        token: str,
        gateway: str,
        policy: RoutingPolicy = RoutingPolicy.LEAST_LOADED,
        *,
        silence_limit_s: float = SILENCE_LIMIT_S,
        ping_s: float = PING_S,
    ) -> None:
        self._token = token
        self._gateway = gateway
        self._policy = policy
        self._silence_limit_s = silence_limit_s
        self._ping_s = ping_s
        self._clients: dict[str, EngineClient] = {}
        self._keepers: dict[AttentionEndpoint, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()
        self._turn = 0

    @property
    def clients(self) -> list[EngineClient]:
        """Streams that are open, by worker name."""
        ready = (client for client in self._clients.values() if client.hello is not None)
        return sorted(ready, key=lambda client: client.worker)

    def update(self, endpoints: Sequence[AttentionEndpoint]) -> None:
        """Open streams to new workers, and drop those that are not listed any more."""
        for gone in set(self._keepers) - set(endpoints):
            logger.info("%s left the generation: stream dropped", gone.name)
            self._keepers.pop(gone).cancel()
        for endpoint in endpoints:
            if endpoint not in self._keepers:
                self._keepers[endpoint] = asyncio.create_task(self._keep(endpoint))

    def assign(self, request: Request, sink: OutputSink) -> Assignment | None:
        """Hand a request to a worker; None while no stream is open."""
        clients = {client.worker: client for client in self.clients}
        loads = [
            WorkerLoad(name=name, outstanding_tokens=client.outstanding_tokens)
            for name, client in clients.items()
        ]
        picked = pick_worker(loads, self._policy, self._turn)
        if picked is None:
            return None
        self._turn += 1
        client = clients[picked.name]
        client.submit(request, sink)
        return Assignment(client, request.request_id)

    async def wait_change(self, timeout_s: float) -> None:
        """Return when a stream opens or ends, or after ``timeout_s``."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), timeout_s)

    async def stop(self) -> None:
        """End all streams; their requests fail."""
        keepers = list(self._keepers.values())
        self.update([])
        await asyncio.gather(*keepers, return_exceptions=True)

    async def _keep(self, endpoint: AttentionEndpoint) -> None:
        """One stream after the other to the same worker, until it is not listed any more."""
        while True:
            client = EngineClient(
                endpoint.name,
                endpoint.address,
                self._token,
                self._gateway,
                silence_limit_s=self._silence_limit_s,
                ping_s=self._ping_s,
            )
            self._clients[endpoint.name] = client
            announcer = asyncio.create_task(self._announce(client))
            reason = "the worker left the generation"
            try:
                reason = await client.run()
            finally:
                announcer.cancel()
                if self._clients.get(endpoint.name) is client:
                    del self._clients[endpoint.name]
                self._notify()
                self._fail_lost(client.take_submissions(), endpoint.name, reason)
            logger.warning("stream to %s ended: %s", endpoint.name, reason)
            await asyncio.sleep(_RETRY_S)

    async def _announce(self, client: EngineClient) -> None:
        await client.connected.wait()
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _fail_lost(self, lost: Sequence[Submission], worker: str, reason: str) -> None:
        """A later step hands these to another worker, with the outputs so far."""
        for entry in lost:
            logger.warning("request %s was lost with %s", entry.request.request_id, worker)
            entry.sink.fail(NotReadyError(f"the worker was lost ({reason})", "not_ready", 1.0))
