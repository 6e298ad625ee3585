"""A client that stays connected and does not read, behind Ray Serve's real proxy."""

from __future__ import annotations

import socket

import pytest

from benchmarks.harness.server import Served
from benchmarks.harness.stalls import wait_until
from tests.harness.tiers import quick_rows
from tests.served.test_disconnect import disconnects, given_up, send

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("unharmed")]

NUM_CHOICES = 16


def unread_stream(server: Served, logprobs: int | None = 5) -> socket.socket:
    """The connection of a stream that nobody has read, once the server has ended its requests."""
    with given_up(server, num_choices=NUM_CHOICES):
        fields = {"prompt": "x", "n": NUM_CHOICES, "logprobs": logprobs, "stream": True}
        return send(server, "/v1/completions", **fields)


@pytest.mark.parametrize("logprobs", quick_rows({5}, [5, None]))
def test_a_stream_that_nobody_reads_ends_and_says_why(server: Served, logprobs: int | None) -> None:
    last = b""
    with unread_stream(server, logprobs) as connection:
        while b"[DONE]" not in last:
            received = connection.recv(1 << 20)
            assert received, "the stream ends without its end"
            last = (last + received)[-4096:]
    assert b'"code":"slow_client"' in last


def test_a_client_that_leaves_without_having_read_is_noticed(server: Served) -> None:
    before = disconnects(server)
    unread_stream(server).close()
    wait_until(lambda: disconnects(server) == before + 1, "the count of clients that left")
