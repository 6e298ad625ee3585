"""Transport over torch.distributed: NCCL on GPUs, gloo in CPU tests, with the same code.

The transport carries only messages between attention and expert ranks. Step headers and the
detection of lost peers use ``PeerConnections``. gloo and the rendezvous store have no
authentication, so they listen on the cluster interface only.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import NoReturn
from weakref import WeakSet

import torch
from torch import Tensor

from cluster.core.errors import PeerLostError, TransportError, first_line
from cluster.core.topology import Generation
from workers.cuda.step_graph import StepGraph
from workers.requests.step_header import StepHeader
from workers.transport.captured_transfers import CapturedTransfers
from workers.transport.confirmations import StepConfirmations
from workers.transport.peer_connections import PeerConnections
from workers.transport.rendezvous import Rendezvous, world_names
from workers.transport.transfer_items import items_to_receive, items_to_send
from workers.transport.transport import ExpectedMessage, RowMessage, Tag, empty_messages
from workers.transport.world import Backend, Item, Transfers, World

_JOIN_S = 1.0
_COUNTS = 2
"""Index, within a message, of the transfer with the row counts; the two parts have 0 and 1."""
_MAX_AHEAD = 4
"""Maximum number of receives that only the device waits for. At this limit the host has enqueued
some hundred launches (two to four layers). A CUDA stream accepts about a thousand. If the stream
filled up while it waits for a lost peer, the host would block in a launch and could not abandon the
process groups."""
_MAX_AHEAD_PROMPTS = 1
"""The same in a step with prompts, which launches two more kernels for each prompt in a layer."""


class CollectiveTransport:
    """``DataTransport`` of one worker over torch.distributed, with a ``World`` per generation."""

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
        """On an attention worker, open a rendezvous store on ``host``; port 0 is a free port."""
        self.sums_are_rounded = backend == "nccl"
        """Whether partial sums are sent in the model's dtype instead of float32."""
        self._connections = connections
        self._confirmations = StepConfirmations(connections)
        self._backend: Backend = backend
        self._device = device
        self.rendezvous = Rendezvous(
            connections,
            backend=backend,
            device=device,
            host=host,
            store_port=store_port,
            connect_timeout_s=connect_timeout_s,
        )
        self._world: World | None = None
        self._peers: dict[int, int] = {}
        self._names: dict[int, str] = {}
        self._sends: deque[Transfers] = deque()
        self._ordered: deque[Transfers] = deque()
        """Receives that the CUDA stream waits for but the host has not waited for yet."""
        self._header: StepHeader | None = None
        self._max_ahead = _MAX_AHEAD
        self._num_worlds = 0
        self._graphs: WeakSet[StepGraph] = WeakSet()
        """CUDA graphs that contain transfers of the world."""
        self._is_replayed = False
        """Whether a graph with transfers has been launched and not been waited for."""
        self._late: StepHeader | None = None
        """The latest step of ``finish_later``, until its function is called."""
        self._loss: PeerLostError | None = None

    def apply_generation(self, generation: Generation) -> None:
        """Create the process groups of a generation. Collective: all members must call it."""
        self._abandon()
        self._loss = None
        names = world_names(generation)
        facing = generation.peers_of(self._connections.me.role)
        self._names = {m.rank: m.name for m in facing}
        self._peers = {m.rank: names.index(m.name) for m in facing}
        self._num_worlds += 1
        address = generation.leader.store_address
        if not address:
            raise PeerLostError(generation.leader.name, "it has no rendezvous store address")
        peers, blamed = tuple(self._peers.values()), list(self._names.values())[:1]
        self._world = world = self.rendezvous.new_world(generation.number, names, peers)
        try:
            self.rendezvous.connect(world, address, blamed)
        except BaseException:
            self._abandon()
            raise

    def begin_step(self, header: StepHeader) -> None:
        """Start a step, after the sends of the previous step have completed."""
        self._ordered.clear()
        self._is_replayed = False
        self._header = header
        self._max_ahead = _MAX_AHEAD_PROMPTS if header.prefill_rows else _MAX_AHEAD
        oldest = header if self._late is None else self._late
        self._connections.begin_step(oldest.step)  # the late step is confirmed on the edges
        while self._sends:
            self._wait(self._sends.popleft())

    def post(self, tag: Tag, messages: Sequence[RowMessage], *, sized: bool) -> None:
        """Start to send messages. If ``sized``, counts are sent first. Empty parts are not sent."""
        self._drop_sent()
        items = []
        for message in messages if sized else ():
            counts = torch.tensor([len(p) for p in message.parts], device=self._device)
            items.append(self._item(message.rank, tag, _COUNTS, counts))
        items += items_to_send(self._item, tag, messages)
        if items:
            self._sends += self._start(tag, True, items)

    def receive(
        self, tag: Tag, expected: Sequence[ExpectedMessage], *, sized: bool, must_wait: bool
    ) -> list[tuple[Tensor, ...]]:
        """Receive one message from each expected rank; see ``DataTransport.receive``."""
        counts = [item.counts for item in expected]
        if sized:
            counts = self._receive_counts(tag, expected)
        received = empty_messages(expected, self._device, counts)
        items = items_to_receive(self._item, tag, expected, received)
        if items:
            self._receive(tag, items, must_wait)
        return received

    def finish_step(self) -> None:
        """Wait for a replay, and for all receives that only the CUDA stream has waited for."""
        if self._is_replayed:
            self._is_replayed = False
            self._watched(self._live_world().stream_end(), lambda: list(self._names.values()))
        elif not self._ordered:
            return
        while self._ordered:
            self._wait(self._ordered.popleft())
        self._connections.poll()

    def finish_later(self) -> Callable[[], None]:
        """Return a function that finishes the current step, a replay, and waits until all expert
        ranks have confirmed it; see ``DataTransport.finish_later``."""
        world, header = self._live_world(), self._header
        assert self._is_replayed, "a graph has been launched"
        assert header is not None, "a step has begun"
        self._is_replayed, self._late = False, header
        wait, names = world.stream_end(), list(self._names.values())

        def finish() -> None:
            if self._late is header:
                self._late = None
            if self._world is not world:
                self._live_world()  # raises the error for which the world was abandoned
                raise TransportError("the step belongs to an earlier generation")
            self._watched(wait, lambda: names)
            self._connections.poll()
            self._confirmations.wait(header, self._names)

        return finish

    def confirm_step(self) -> None:
        """Confirm the step; see ``StepConfirmations``. Over gloo, do nothing, as the host waits for
        rows before it sends outputs."""
        if self._backend == "nccl" and self._header is not None:
            self._confirmations.send(self._header, self._names)

    def await_confirmation(self) -> None:
        """Wait until all expert ranks have confirmed the step. Over gloo, do nothing."""
        if self._backend == "nccl" and self._header is not None:
            self._confirmations.wait(self._header, self._names)

    @property
    def captured_state(self) -> Hashable:
        """The number of the world, to which captured transfers belong; None over gloo."""
        return self._num_worlds if self._backend == "nccl" else None

    def capture(self, graph: StepGraph) -> CapturedTransfers | None:
        """Return messages that become part of ``graph``; None over gloo.

        Before each replay, the errors of ``DataTransport`` are raised if the world is lost.
        """
        if self._backend != "nccl":
            return None
        world = self._live_world()

        def begin_replay() -> None:
            self._live_world()
            self._is_replayed = True

        graph.before(begin_replay)
        self._graphs.add(graph)
        return CapturedTransfers(world, graph, self._item, self._connections.check, self._device)

    def direct(self, ranks: Sequence[int]) -> None:
        """Return None: native code cannot send or receive over torch.distributed."""

    def reject(self, rank: int, reason: str) -> NoReturn:
        """Drop the process groups and a rank that sent invalid data. Raises ``PeerLostError``."""
        self._abandon()
        self._connections.reject(self._names[rank], reason)

    def close(self) -> None:
        """Abandon the process groups and wait up to ``_JOIN_S`` for their threads to end."""
        world = self._world
        self._abandon()
        if world is not None:
            world.join(_JOIN_S)

    def _abandon(self) -> None:
        self._sends.clear()
        self._ordered.clear()
        self._is_replayed, self._late = False, None
        if self._world is not None:
            self._world.abandon()
            self._world = None
        while self._graphs:  # NCCL frees an aborted communicator once no graph holds it
            self._graphs.pop().drop()

    def _receive_counts(
        self, tag: Tag, expected: Sequence[ExpectedMessage]
    ) -> list[tuple[int, ...]]:
        tensors = [
            torch.empty(len(e.parts), dtype=torch.int64, device=self._device) for e in expected
        ]
        pairs = zip(expected, tensors, strict=True)
        items = [self._item(e.rank, tag, _COUNTS, tensor) for e, tensor in pairs]
        self._receive(tag, items, must_wait=True)
        counts = []
        for item, tensor in zip(expected, tensors, strict=True):
            numbers = tuple(int(n) for n in tensor.tolist())  # device-to-host sync
            if any(not 0 <= n <= most for n, most in zip(numbers, item.counts, strict=True)):
                self.reject(item.rank, f"{numbers} rows announced, at most {item.counts} expected")
            counts.append(numbers)
        return counts

    def _item(self, rank: int, tag: Tag, part: int, tensor: Tensor) -> Item:
        place = (tag.bank * 8 + tag.exchange) * 2 + tag.micro_batch
        number = place * 8 + 4 * (tag.direction == "outputs") + part
        return Item(rank, self._peers[rank], number, tensor)

    def _start(self, tag: Tag, is_send: bool, items: Sequence[Item]) -> list[Transfers]:
        try:
            self._connections.check()
        except BaseException:
            self._abandon()  # the device may wait for a message that is never sent
            raise
        world = self._live_world()
        try:
            return world.start(tag.direction, is_send, items)
        except RuntimeError as err:
            self._fail(items[0].rank, first_line(err))

    def _receive(self, tag: Tag, items: Sequence[Item], must_wait: bool) -> None:
        for transfers in self._start(tag, False, items):
            if must_wait or not self._live_world().order(transfers):
                self._wait(transfers)
                continue
            self._check(transfers)
            self._ordered.append(transfers)
            while len(self._ordered) > self._max_ahead:
                self._wait(self._ordered.popleft())

    def _drop_sent(self) -> None:
        """Free the memory of completed sends, up to the first that is not complete."""
        while self._sends and self._live_world().is_over(self._sends[0]):
            self._check(self._sends.popleft())

    def _wait(self, transfers: Transfers) -> None:
        world = self._live_world()
        self._watched(
            lambda watch: world.wait(transfers, watch),
            lambda: [self._names[item.rank] for item in transfers.items[transfers.num_done :]],
        )
        self._check(transfers)

    def _watched(
        self, wait: Callable[[Callable[[], None]], None], awaited: Callable[[], Sequence[str]]
    ) -> None:
        """Call ``wait`` with a function that raises to end the wait. ``awaited``: names of the
        peers that are waited for, of which the first is blamed for a timeout."""
        limit = self._connections.step_timeout_s
        deadline = time.monotonic() + limit

        def watch() -> None:
            names = awaited()
            self._connections.loop.awaited = tuple(names)
            self._connections.poll()
            if names and time.monotonic() > deadline:
                raise PeerLostError(names[0], f"no data within {limit:g} s")

        try:
            with self._connections.awaiting():
                wait(watch)
        except PeerLostError as err:
            self._loss = err
            self._abandon()
            raise
        except BaseException:
            self._abandon()
            raise

    def _check(self, transfers: Transfers) -> None:
        """If a transfer has failed, abandon the process groups and raise ``PeerLostError``."""
        if transfers.error:
            self._fail(transfers.items[transfers.num_done].rank, transfers.error)

    def _live_world(self) -> World:
        """Return the process groups, or raise the error for which they were abandoned."""
        if self._world is not None:
            return self._world
        if self._loss is not None:
            raise PeerLostError(self._loss.peer, self._loss.reason)
        self._connections.check()
        raise TransportError("there is no process group before a generation has been applied")

    def _fail(self, rank: int, reason: str) -> NoReturn:
        self._loss = PeerLostError(self._names[rank], reason)
        self._abandon()
        self._connections.poll(0.05)  # may raise with a better reason
        raise self._loss
