"""Publishes the cached KV blocks over ZeroMQ, for routers of other projects.

A message has three frames: topic, number (8 bytes, big-endian) and a batch of
``workers.kv.router_events``. Numbers increase by one. A worker's first number is the time in
microseconds, so there is a gap after the messages of a worker that it replaces. A subscriber that
connects later thus notices that it missed the first message, which clears all blocks. To repeat
missed messages, a subscriber sends an empty frame and the first missed number to the replay socket.
It receives the stored messages, each after an empty frame, and then a message with the number -1
and no payload, as in vLLM 0.33.

The engine's thread only appends changes to a list and wakes this module's thread, which creates and
sends the events. ZeroMQ drops messages for a slow subscriber, so the thread never waits for one. If
the thread itself was too slow, or its port was not free, changes are lost; routers then receive an
event that clears all blocks.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from cluster.config.kv_events import KvEventsSection, is_listening, rank_endpoint
from cluster.core.errors import ConfigError
from workers.kv.block_pool import HashChanges
from workers.kv.router_events import BlockContent, Event, EventBatch, RouterFeed
from workers.requests.block_hash import BlockHash
from workers.transport.socket_io import WakePipe

if TYPE_CHECKING:
    import zmq

logger = logging.getLogger(__name__)

_MAX_WAITING = 10_000
"""Maximum number of steps whose changes are queued for the thread."""
_RETRY_S = 1.0
"""Pause before another attempt to open the sockets: a previous worker may still hold the port."""
_STOP_S = 5.0
_MAX_REQUEST_BYTES = 1024
"""Longest frame that a peer may send; a connection with a longer one is closed."""
_END = (-1).to_bytes(8, "big", signed=True)
_Change = tuple[HashChanges, Mapping[BlockHash, BlockContent]]


@dataclass(slots=True)
class _Sockets:
    """Open sockets and their poller."""

    events: zmq.Socket[bytes]
    replay: zmq.Socket[bytes] | None
    poller: zmq.Poller


class KvPublisher:
    """Publishes the KV events of one attention worker, on its own thread.

    Args:
        section: configuration with an endpoint.
        rank: the attention rank.
        block_size: tokens of a block.
        adapters: returns adapter names by key; called on any thread.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        section: KvEventsSection,
        rank: int,
        block_size: int,
        adapters: Callable[[], Mapping[str, str]] = dict,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Raises ``ConfigError`` if the ZeroMQ package is missing."""
        self._zmq = _load_zmq(section)
        self._section = section
        self._rank = rank
        self._clock = clock
        self._feed = RouterFeed(block_size, adapters)
        self._lock = threading.Lock()
        self._changes: list[_Change] = []
        self._must_clear = True  # routers may know blocks of the previous worker
        self._number = int(1e6 * clock())
        self._sent: deque[tuple[bytes, bytes]] = deque(maxlen=section.kv_events_buffer_steps)
        self._encode = msgspec.msgpack.Encoder().encode
        self._topic = section.kv_events_topic.encode()
        self._wakeup = WakePipe()
        self._is_ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kv-publisher", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def publish(self, changes: HashChanges, contents: Mapping[BlockHash, BlockContent]) -> None:
        """Queue the changes of a step, see ``RouterFeed.change``. Engine's thread; never waits."""
        if not (changes.stored or changes.removed or contents):
            return
        with self._lock:
            if len(self._changes) >= _MAX_WAITING:
                self._must_clear = True
                self._changes.clear()
            self._changes.append((changes, contents))
        self._wakeup.ring()

    def close(self) -> None:
        """End the thread and drop pending messages."""
        self._is_ending.set()
        self._wakeup.ring()
        if self._thread.ident is not None:
            self._thread.join(_STOP_S)
        self._wakeup.close()

    def _run(self) -> None:
        with self._zmq.Context() as context:
            sockets: _Sockets | None = None
            try:
                while sockets is None and not self._is_ending.is_set():
                    sockets = self._open(context)
                while sockets is not None and not self._is_ending.is_set():
                    self._send_changes(sockets.events)
                    self._handle_replay(sockets)
            except Exception:
                logger.exception("the publisher of KV events failed")
            finally:
                context.destroy(linger=0)

    def _open(self, context: zmq.Context[Any]) -> _Sockets | None:
        """Open, then bind or connect the sockets. If that fails, pause and return None."""
        api, section, rank = self._zmq, self._section, self._rank
        assert section.kv_events_endpoint is not None
        opened: list[zmq.Socket[bytes]] = []
        poller = api.Poller()
        poller.register(self._wakeup.fileno(), api.POLLIN)
        try:
            events = self._make_socket(context, api.PUB, section.kv_events_buffer_steps)
            opened.append(events)
            self._bind_or_connect(events, rank_endpoint(section.kv_events_endpoint, rank))
            replay = None
            if section.kv_events_replay_endpoint is not None:
                # fits a whole replay: ZeroMQ notices late that a subscriber has read
                replay = self._make_socket(
                    context, api.ROUTER, 2 * (section.kv_events_buffer_steps + 1)
                )
                opened.append(replay)
                self._bind_or_connect(
                    replay, rank_endpoint(section.kv_events_replay_endpoint, rank)
                )
                poller.register(replay, api.POLLIN)
        except api.ZMQError as err:
            for each in opened:
                each.close(linger=0)
            logger.warning("could not open the sockets for KV events: %s", err)
            self._is_ending.wait(_RETRY_S)
            return None
        return _Sockets(events, replay, poller)

    def _make_socket(self, context: zmq.Context[Any], kind: int, limit: int) -> zmq.Socket[bytes]:
        made: zmq.Socket[bytes] = context.socket(kind)
        made.setsockopt(self._zmq.SNDHWM, limit)
        made.setsockopt(self._zmq.MAXMSGSIZE, _MAX_REQUEST_BYTES)
        return made

    def _bind_or_connect(self, socket: zmq.Socket[bytes], endpoint: str) -> None:
        """Bind or connect a socket as the endpoint requires. Raises ``ZMQError``."""
        socket.setsockopt(self._zmq.IPV6, "[" in endpoint)
        if is_listening(endpoint):
            socket.bind(endpoint)
        else:
            socket.connect(endpoint)
        logger.info("KV events at %s", endpoint)

    def _send_changes(self, socket: zmq.Socket[bytes]) -> None:
        with self._lock:
            must_clear, self._must_clear = self._must_clear, False
            changes, self._changes = self._changes, []
        if must_clear:
            self._send(socket, self._feed.clear())
        for each in changes:
            self._send(socket, self._feed.change(*each))

    def _send(self, socket: zmq.Socket[bytes], events: list[Event]) -> None:
        if not events:
            return
        batch = EventBatch(ts=self._clock(), events=events, data_parallel_rank=self._rank)
        message = self._number.to_bytes(8, "big"), self._encode(batch)
        self._number += 1
        self._sent.append(message)
        socket.send_multipart((self._topic, *message))  # ZeroMQ drops it for slow subscribers

    def _handle_replay(self, sockets: _Sockets) -> None:
        """Wait for changes or a replay request; send the replay if one is requested."""
        ready = dict(sockets.poller.poll())
        self._wakeup.drain()
        replay = sockets.replay
        if replay is None or replay not in ready:
            return
        caller, *question = replay.recv_multipart()
        if len(question) != 2 or question[0] or len(question[1]) != 8:
            logger.warning("ignored a replay request for KV events with %d frames", len(question))
            return
        first = int.from_bytes(question[1], "big")
        for number, payload in self._sent:
            if int.from_bytes(number, "big") >= first:
                replay.send_multipart((caller, b"", self._topic, number, payload))
        replay.send_multipart((caller, b"", b"", _END, b""))


def _load_zmq(section: KvEventsSection) -> Any:
    try:
        import zmq
    except ImportError as err:
        needs = "needs the extra kv-events: pip install -c constraints.txt -e '.[kv-events]'"
        raise ConfigError("kv_events_endpoint", section.kv_events_endpoint, needs) from err
    return zmq
