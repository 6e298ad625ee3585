"""Exact reads and wake-ups, on socket pairs."""

from __future__ import annotations

import selectors
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from benchmarks.harness.engine_stream import TIMEOUT_S
from workers.transport.socket_io import WakePipe, receive_exactly, time_left


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    near, far = socket.socketpair()
    with near, far:
        near.settimeout(TIMEOUT_S)
        yield near, far


def test_a_view_is_filled_from_many_pieces(pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair
    data = bytearray(6)

    def send() -> None:
        for i in range(7):
            far.sendall(bytes([i]))

    sender = threading.Thread(target=send)
    sender.start()
    receive_exactly(near, memoryview(data))
    sender.join(TIMEOUT_S)
    assert data == bytes(range(6))
    assert near.recv(10) == bytes([6]), "nothing beyond it is read"


def test_an_end_and_a_deadline_are_errors(pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair
    far.sendall(b"ab")
    with pytest.raises(TimeoutError):
        receive_exactly(near, memoryview(bytearray(3)), time.monotonic() + 0.05)
    with pytest.raises(TimeoutError, match="timed out"):
        receive_exactly(near, memoryview(bytearray(1)), time.monotonic() - 1.0)
    far.close()
    with pytest.raises(ConnectionError, match="closed the connection"):
        receive_exactly(near, memoryview(bytearray(1)), time.monotonic() + TIMEOUT_S)


def test_time_left_is_positive_or_an_error() -> None:
    assert 0.0 < time_left(time.monotonic() + TIMEOUT_S) <= TIMEOUT_S
    with pytest.raises(TimeoutError):
        time_left(time.monotonic())


def test_rings_wake_a_selector_once() -> None:
    with closing(WakePipe()) as pipe, selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        assert selector.select(0) == []
        for _ in range(100_000):  # more than the buffer takes: nothing blocks
            pipe.ring()
        assert [key.fileobj for key, _ in selector.select(0)] == [pipe]
        pipe.drain()
        assert selector.select(0) == []


def test_a_wait_ends_with_a_ring_or_its_time() -> None:
    pipe = WakePipe()
    pipe.wait(0.01)
    ringer = threading.Timer(0.01, pipe.ring)
    ringer.start()
    began = time.monotonic()
    pipe.wait(TIMEOUT_S)
    assert time.monotonic() - began < TIMEOUT_S
    ringer.join(TIMEOUT_S)
    pipe.close()
    pipe.ring()  # no thread watches any more
