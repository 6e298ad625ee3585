"""KV events over ZeroMQ: numbers, gaps, subscribers that are slow or not there."""

from __future__ import annotations

import builtins
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import msgspec
import pytest

from benchmarks.harness.distributed import free_ports
from benchmarks.harness.stalls import wait_until
from cluster.config.kv_events import KvEventsSection, rank_endpoint
from cluster.core.errors import ConfigError
from tests.harness.kv_subscriber import Subscriber
from tests.workers.kv.router_index import RouterIndex
from workers.kv.block_pool import HashChanges
from workers.kv.router_events import BlockContent
from workers.process import kv_publisher
from workers.process.kv_publisher import KvPublisher
from workers.requests.block_hash import BlockHash

SIZE = 4
TOPIC = "kv@10.0.0.4@tiny"


class Chain:
    """Changes of a cache in which a chain of blocks grows, and is dropped now and then."""

    def __init__(self, publisher: KvPublisher) -> None:
        self._publisher = publisher
        self._length = 0

    def grow(self) -> None:
        name, parent = self._hash(self._length), self._hash(self._length - 1)
        content = BlockContent(
            parent=parent if self._length else None, token_ids=(self._length,) * SIZE
        )
        self._length += 1
        self._publisher.publish(HashChanges(stored=(name,), removed=()), {name: content})

    def drop(self) -> None:
        gone = tuple(self._hash(place) for place in range(self._length))
        self._length = 0
        self._publisher.publish(HashChanges(stored=(), removed=gone), {})

    @property
    def prefixes(self) -> set[tuple[int, ...]]:
        """What a router should know."""
        whole = tuple(place for place in range(self._length) for _ in range(SIZE))
        return {whole[: SIZE * (place + 1)] for place in range(self._length)}

    def _hash(self, place: int) -> BlockHash:
        return place.to_bytes(8, "big", signed=True) * 4


def make_section(steps: int = 1000, has_replay: bool = True) -> KvEventsSection:
    first, second = sorted(free_ports(2))
    return KvEventsSection(
        kv_events_endpoint=f"tcp://127.0.0.1:{first}",
        kv_events_replay_endpoint=f"tcp://127.0.0.1:{second}" if has_replay else None,
        kv_events_topic=TOPIC,
        kv_events_buffer_steps=steps,
    )


@contextmanager
def publishing(section: KvEventsSection, now_s: float = 12.5) -> Iterator[KvPublisher]:
    publisher = KvPublisher(section, 0, SIZE, clock=lambda: now_s)
    publisher.start()
    try:
        yield publisher
    finally:
        publisher.close()


def subscribe(section: KvEventsSection, topic: str = TOPIC) -> Subscriber:
    assert section.kv_events_endpoint is not None
    return Subscriber(section.kv_events_endpoint, section.kv_events_replay_endpoint or "", topic)


def follow(subscriber: Subscriber, index: RouterIndex, chain: Chain) -> int:
    """Subscribe for certain, catch up, and apply everything; returns the last number."""
    number, payload = subscriber.next(chain.grow)
    for missed, before in subscriber.replayed(0):
        if missed < number:
            index.apply(before)
    index.apply(payload)
    while index.prefixes() != chain.prefixes:
        found, payload = subscriber.next()
        assert found == number + 1
        number = found
        index.apply(payload)
    return number


def test_a_subscriber_catches_up_and_follows() -> None:
    section, index = make_section(), RouterIndex(SIZE)
    with publishing(section) as publisher, subscribe(section) as subscriber:
        chain = Chain(publisher)
        for _ in range(3):
            chain.grow()
        follow(subscriber, index, chain)
        assert index.num_cleared == 1, "what a worker before it told is void"
        assert index.ranks == {0}
        assert subscriber.topics == {TOPIC.encode()}
        chain.drop()
        index.apply(subscriber.next()[1])
        assert index.prefixes() == set()


def test_what_a_subscriber_missed_is_sent_again() -> None:
    section, index = make_section(), RouterIndex(SIZE)
    with publishing(section) as publisher, subscribe(section) as subscriber:
        chain = Chain(publisher)
        last = follow(subscriber, index, chain)
        for _ in range(5):
            chain.grow()
        for _ in range(4):
            subscriber.next()  # lost on the way
        number, payload = subscriber.next()
        assert number == last + 5
        again = [(n, p) for n, p in subscriber.replayed(last + 1) if n < number]
        assert [n for n, _ in again] == [last + 1, last + 2, last + 3, last + 4]
        for _, before in again:
            index.apply(before)
        index.apply(payload)
        assert index.prefixes() == chain.prefixes


def test_a_subscriber_sees_that_a_worker_was_replaced() -> None:
    section, index = make_section(), RouterIndex(SIZE)
    with subscribe(section) as subscriber:
        with publishing(section) as publisher:
            last = follow(subscriber, index, Chain(publisher))
        with publishing(section, now_s=60.0) as publisher:
            chain = Chain(publisher)
            for _ in range(3):
                chain.grow()
            number, payload = subscriber.next(chain.grow)
            assert number > last + 1, "nobody would ask for what was missed"
            for missed, before in subscriber.replayed(last + 1):
                if missed < number:
                    index.apply(before)
            index.apply(payload)
            while index.prefixes() != chain.prefixes:
                index.apply(subscriber.next()[1])
    assert index.num_cleared == 2


def test_only_the_newest_messages_are_kept() -> None:
    section = make_section(steps=3)
    with publishing(section) as publisher, subscribe(section) as subscriber:
        chain = Chain(publisher)
        last, _ = subscriber.next(chain.grow)
        for _ in range(10):
            chain.grow()
        wait_until(lambda: max(n for n, _ in subscriber.replayed(0)) >= last + 10, "the last one")
        assert [n for n, _ in subscriber.replayed(0)][-1] - subscriber.replayed(0)[0][0] == 2
        assert subscriber.replayed(last + 10**6) == []


def test_a_question_that_is_none_disturbs_nobody() -> None:
    section, index = make_section(), RouterIndex(SIZE)
    with publishing(section) as publisher, subscribe(section) as subscriber:
        for frames in ((b"",), (b"", b"seven b"), (b"x", b"8 bytes."), (b"", b"8 bytes.", b"y")):
            subscriber.send_rubbish(*frames)
        subscriber.send_rubbish(b"", b"8 bytes." * 1000)
        follow(subscriber, index, Chain(publisher))


def test_other_topics_are_not_sent() -> None:
    section = make_section()
    with publishing(section) as publisher, subscribe(section, "kv@other") as other:
        chain = Chain(publisher)
        with subscribe(section) as subscriber:
            subscriber.next(chain.grow)
        assert not other.has_more()


def test_a_step_never_waits_for_a_subscriber_or_for_the_thread() -> None:
    """The thread does not run: the newest changes are kept, and routers forget the others."""
    section = make_section(has_replay=False)
    publisher = KvPublisher(section, 0, SIZE)
    chain = Chain(publisher)
    with mock.patch.object(kv_publisher, "_MAX_WAITING", 50):
        for _ in range(40):
            chain.grow()
        chain.drop()
        for _ in range(25):
            chain.grow()
        assert len(publisher._changes) <= 50
        with subscribe(section) as subscriber:
            publisher.start()
            payloads = [subscriber.next(chain.grow)[1]]
            while subscriber.has_more():
                payloads.append(subscriber.next()[1])
        publisher.close()
    kinds = [event["type"] for p in payloads for event in msgspec.msgpack.decode(p)[1]]
    assert set(kinds) <= {"AllBlocksCleared", "BlockStored"}, "the removal was dropped"


def test_a_subscriber_that_reads_nothing_costs_messages_and_no_time() -> None:
    """It loses messages beyond the limit; they can be asked for."""
    section, index = make_section(steps=2000), RouterIndex(SIZE)
    with publishing(section) as publisher, subscribe(section) as slow:
        chain = Chain(publisher)
        first, _ = slow.next(chain.grow)
        for _ in range(1500):
            chain.grow()
        with subscribe(section) as other:
            wait_until(lambda: other.replayed(first + 1500) != [], "the newest one")
            for _, payload in other.replayed(0):
                index.apply(payload)
        assert index.prefixes() == chain.prefixes


def test_a_port_that_is_taken_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    """A worker that is about to end may still hold it."""
    section, index = make_section(), RouterIndex(SIZE)
    assert section.kv_events_endpoint is not None
    port = int(section.kv_events_endpoint.rpartition(":")[2])
    with (
        socket.create_server(("127.0.0.1", port)),
        mock.patch.object(kv_publisher, "_RETRY_S", 0.05),
    ):
        publisher = KvPublisher(section, 0, SIZE)
        publisher.start()
        wait_until(
            lambda: "sockets for KV events: Address already in use" in caplog.text,
            "a refusal",
        )
    with subscribe(section) as subscriber:
        follow(subscriber, index, Chain(publisher))
    publisher.close()


def test_a_publisher_that_cannot_open_ends_when_told() -> None:
    section = make_section()
    assert section.kv_events_endpoint is not None
    port = int(section.kv_events_endpoint.rpartition(":")[2])
    with socket.create_server(("127.0.0.1", port)):
        publisher = KvPublisher(section, 0, SIZE)
        publisher.start()
        publisher.close()
        assert not publisher._thread.is_alive()


def test_each_rank_has_a_port() -> None:
    section = make_section(has_replay=False)
    assert section.kv_events_endpoint is not None
    publisher = KvPublisher(section, 3, SIZE)
    publisher.start()
    with Subscriber(rank_endpoint(section.kv_events_endpoint, 3)) as subscriber:
        index = RouterIndex(SIZE)
        index.apply(subscriber.next(Chain(publisher).grow)[1])
        assert index.ranks == {3}
    publisher.close()


def test_the_missing_package_is_named() -> None:
    real = builtins.__import__

    def without_zmq(name: str, *more: Any, **others: Any) -> Any:
        if name == "zmq":
            raise ImportError(name)
        return real(name, *more, **others)

    with (
        mock.patch.object(builtins, "__import__", without_zmq),
        pytest.raises(ConfigError, match="needs the extra kv-events"),
    ):
        KvPublisher(make_section(), 0, SIZE)
