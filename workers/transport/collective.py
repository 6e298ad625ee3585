"""The transport over torch.distributed: NCCL on GPUs, gloo in CPU tests, one code for both.

Sends and receives go along the attention-expert edges only. Step headers and the detection of lost
peers stay on the peer connections. gloo and its store have no authentication: both listen on the
cluster interface only.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import NoReturn

import torch
from torch import Tensor

from cluster.core.addresses import split_address
from cluster.core.errors import PeerLostError, TransportError, first_line
from cluster.core.topology import Generation, runs_attention
from workers.model.torch_private import Store, TCPStore
from workers.requests.step_header import StepHeader
from workers.transport.peer_connections import PeerConnections
from workers.transport.transport import Expected, RowMessage, Tag
from workers.transport.world import (
    BOTH_WAYS,
    ONE_WAY,
    Backend,
    Channel,
    Transfer,
    TransferWait,
    World,
    build_world,
    listen_store,
)

_JOIN_S = 1.0
_COUNTS = 2
"""Number of the message that carries the counts, after those of the two parts."""


class CollectiveTransport:
    """``DataTransport`` of one worker over a world that is rebuilt with every generation."""

    def __init__(
        self,
        connections: PeerConnections,
        *,
        backend: Backend,
        device: torch.device,
        host: str = "127.0.0.1",
        store_port: int = 0,
        connect_timeout_s: float = 10.0,
    ) -> None:
        """Attention workers open a rendezvous store on ``host``, by default on a free port."""
        self._connections = connections
        self._backend: Backend = backend
        self._device = device
        self._host = host
        self._connect_timeout_s = connect_timeout_s
        self._world: World | None = None
        self._peers: dict[int, int] = {}
        self._names: dict[int, str] = {}
        self._sends: list[Transfer] = []
        self._store = (
            listen_store(host, store_port, connect_timeout_s)
            if runs_attention(connections.me.role)
            else None
        )

    @property
    def store_address(self) -> str:
        """``host:port`` of the rendezvous store: ``Member.store_address``."""
        return f"{self._host}:{self._store.port}" if self._store is not None else ""

    def apply_generation(self, generation: Generation) -> None:
        """See ``DataTransport``. Collective: all members must call it."""
        self._abandon()
        names = [m.name for m in generation.attention]
        names += [m.name for m in generation.experts if m.name not in names]
        facing = generation.facing(self._connections.me.role)
        self._names = {m.rank: m.name for m in facing}
        self._peers = {m.rank: names.index(m.name) for m in facing}
        me = names.index(self._connections.me.name)
        channels = BOTH_WAYS if self._connections.me.role == "colocated" else ONE_WAY
        address = generation.leader.store_address
        if not address:
            raise PeerLostError(generation.leader.name, "it announces no rendezvous store")
        self._world = self._build(
            address, f"generation-{generation.number}", me, len(names), channels
        )

    def _build(
        self, address: str, prefix: str, rank: int, size: int, channels: Sequence[Channel]
    ) -> World:
        """Build the world on another thread, so that an interrupt ends the wait for it."""
        built: list[World] = []
        failures: list[str] = []
        finished = threading.Event()
        given_up = threading.Event()

        def abandon() -> None:
            with contextlib.suppress(IndexError):  # not built yet, or the other thread did
                built.pop().abandon()

        def build() -> None:
            try:
                world = build_world(
                    store=self._open_store(address),
                    prefix=prefix,
                    rank=rank,
                    size=size,
                    channels=channels,
                    backend=self._backend,
                    device=self._device,
                    host=self._host,
                    connect_timeout_s=self._connect_timeout_s,
                    step_timeout_s=self._connections.step_timeout_s,
                )
                built.append(world)
                if given_up.is_set():
                    abandon()
            except (RuntimeError, ValueError) as err:  # torch's own errors: DistError and others
                failures.append(first_line(err))
            finished.set()

        threading.Thread(target=build, daemon=True, name="world-build").start()
        try:
            while not finished.wait(0.02):
                self._connections.poll()
        except BaseException:
            given_up.set()
            abandon()
            raise
        if failures:
            self._await_cause(f"no process group {prefix}: {failures[0]}")
        return built[0]

    def _await_cause(self, reason: str) -> NoReturn:
        """A member has gone, most likely: the edges, or the controller, soon say which.

        Raises as the waits do, at last for the first peer.
        """
        self._connections.wait(
            lambda: False,
            lambda: list(self._names.values())[:1],
            timeout_s=self._connect_timeout_s,
            what=reason + ": no cause",
        )
        raise AssertionError("the wait has ended by raising")

    def _open_store(self, address: str) -> Store:
        if self._store is not None and address == self.store_address:
            return self._store
        host, port = split_address(address)
        return TCPStore(
            host, port, is_master=False, timeout=timedelta(seconds=self._connect_timeout_s)
        )

    def begin_step(self, header: StepHeader) -> None:
        """See ``DataTransport``. Drops the sends of the last step, which are complete by now."""
        sends, self._sends = self._sends, []
        if sends:
            self._wait(sends)

    def post(self, tag: Tag, messages: Sequence[RowMessage], *, sized: bool) -> None:
        """See ``DataTransport``. Counts go first where ``sized``; empty parts are not sent."""
        items = []
        for message in messages:
            if sized:
                counts = torch.tensor([len(p) for p in message.parts], device=self._device)
                items.append(self._item(message.rank, tag, _COUNTS, counts))
            for i, part in enumerate(message.parts):
                if part.numel():
                    # The caller may write into its rows before they are sent; outputs are ours.
                    data = part.clone() if tag.direction == "rows" else part
                    items.append(self._item(message.rank, tag, i, data.contiguous()))
        if items:
            self._sends += self._start(tag, True, items)

    def receive(
        self, tag: Tag, expected: Sequence[Expected], *, sized: bool
    ) -> list[tuple[Tensor, ...]]:
        counts = [item.counts for item in expected]
        if sized:
            counts = self._receive_counts(tag, expected)
        received = [
            tuple(
                torch.empty(n, part.width, dtype=part.dtype, device=self._device)
                for part, n in zip(item.parts, numbers, strict=True)
            )
            for item, numbers in zip(expected, counts, strict=True)
        ]
        items = [
            self._item(item.rank, tag, i, tensor)
            for item, tensors in zip(expected, received, strict=True)
            for i, tensor in enumerate(tensors)
            if tensor.numel()
        ]
        if items:
            self._wait(self._start(tag, False, items))
        return received

    def direct(self, ranks: Sequence[int]) -> None:
        """See ``DataTransport``."""

    def reject(self, rank: int, reason: str) -> NoReturn:
        self._connections.reject(self._names[rank], reason)

    def close(self) -> None:
        """Abandon the world and give its waiter thread a moment to end it."""
        world = self._world
        self._abandon()
        if world is not None:
            world.join(_JOIN_S)

    def _abandon(self) -> None:
        self._sends.clear()
        if self._world is not None:
            self._world.abandon()
            self._world = None

    def _receive_counts(self, tag: Tag, expected: Sequence[Expected]) -> list[tuple[int, ...]]:
        tensors = [
            torch.empty(len(e.parts), dtype=torch.int64, device=self._device) for e in expected
        ]
        pairs = zip(expected, tensors, strict=True)
        items = [self._item(e.rank, tag, _COUNTS, tensor) for e, tensor in pairs]
        self._wait(self._start(tag, False, items))
        counts = []
        for item, tensor in zip(expected, tensors, strict=True):
            numbers = tuple(int(n) for n in tensor.tolist())  # device-to-host sync
            if any(not 0 <= n <= most for n, most in zip(numbers, item.counts, strict=True)):
                self.reject(item.rank, f"{numbers} rows announced, at most {item.counts} expected")
            counts.append(numbers)
        return counts

    def _item(self, rank: int, tag: Tag, part: int, tensor: Tensor) -> tuple[int, int, int, Tensor]:
        place = (tag.bank * 8 + tag.exchange) * 2 + tag.micro_batch
        number = place * 8 + 4 * (tag.direction == "outputs") + part
        return rank, self._peers[rank], number, tensor

    def _start(
        self, tag: Tag, is_send: bool, items: Sequence[tuple[int, int, int, Tensor]]
    ) -> list[Transfer]:
        self._connections.check()
        world = self._live_world()
        try:
            return world.transfer(tag.direction, is_send, items)
        except RuntimeError as err:
            self._fail(items[0][0], first_line(err))

    def _wait(self, transfers: Sequence[Transfer]) -> None:
        world = self._live_world()
        ticket = TransferWait(transfers)
        limit = self._connections.step_timeout_s
        deadline = time.monotonic() + limit

        def watch() -> None:
            self._connections.poll()
            if time.monotonic() > deadline:
                rank = transfers[ticket.num_done].rank
                raise PeerLostError(self._names[rank], f"no data within {limit:g} s")

        try:
            world.wait(ticket, watch)
        except BaseException:
            self._abandon()
            raise
        if ticket.error:
            self._fail(transfers[ticket.num_done].rank, ticket.error)

    def _live_world(self) -> World:
        if self._world is None:
            raise TransportError("the process group was given up: a new generation makes another")
        return self._world

    def _fail(self, rank: int, reason: str) -> NoReturn:
        self._abandon()
        self._connections.poll(0.05)  # may raise with a better reason
        raise PeerLostError(self._names[rank], reason)
