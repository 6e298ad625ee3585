"""Paths that lose everything between two hosts whose workers live."""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from msgspec.structs import replace

from benchmarks.harness.mesh import make_connections
from cluster.core.errors import PeerLostError
from cluster.core.topology import Generation
from tests.workers.transport.blackhole import lose_all_to
from tests.workers.transport.test_peer_connections import form, member, rows_frame
from workers.transport.path_watch import PathState, PathWatch
from workers.transport.peer_connections import PeerConnections

LIMIT_S = 60.0
"""Longest wait for anything, on a machine that is busy with other work."""


def looks(watch: PathWatch, *seen: tuple[float, PathState]) -> list[str | None]:
    return [watch.look(state, now) for now, state in seen]


def test_bytes_that_stay_unacknowledged_show_a_dead_path() -> None:
    found = looks(
        PathWatch(2.0),
        (10.0, PathState(0, 2, 500)),
        (11.0, PathState(2, 2, 500)),
        (11.9, PathState(3, 2, 500)),
        (12.0, PathState(3, 2, 500)),
    )
    assert found == [None, None, None, "no acknowledgement for 2.0 s"]


def test_an_acknowledgement_begins_the_time_again() -> None:
    watch = PathWatch(2.0)
    found = looks(
        watch,
        (10.0, PathState(0, 2, 500)),
        (11.9, PathState(3, 2, 501)),
        (13.8, PathState(3, 2, 501)),
    )
    assert found == [None, None, None]
    assert not watch.is_settled
    assert watch.look(PathState(0, 0, 600), 30.0) is None
    assert watch.is_settled
    assert watch.look(PathState(5, 1, 600), 60.0) is None  # a new frame


def test_a_peer_that_reads_nothing_is_not_dead() -> None:
    """Its buffers are full: the kernel sends nothing, so nothing is unacknowledged."""
    states = [(10.0 + i, PathState(0, 0, 500)) for i in range(20)]
    assert looks(PathWatch(2.0), *states) == [None] * 20


def test_a_pause_of_the_own_host_is_not_the_peers() -> None:
    """No timer ran either, so that there are few retransmissions."""
    found = looks(PathWatch(2.0), (10.0, PathState(0, 1, 5)), (70.0, PathState(1, 1, 5)))
    assert found == [None, None]


@pytest.mark.parametrize("is_outward", [True, False], ids=["rows are lost", "outputs are lost"])
def test_a_path_that_loses_one_direction_is_noticed_by_who_sends(is_outward: bool) -> None:
    home, expert = (make_connections(r, 0, path_limit_s=0.5) for r in ("attention", "expert"))
    with ThreadPoolExecutor(2) as pool:
        form(pool, 1, home, expert)
        end = expert.edges["attention-0"] if is_outward else home.edges["expert-0"]
        lose_all_to(end.sock)
        home.send("expert-0", rows_frame(length=3), [b"abc"])
        with pytest.raises(PeerLostError, match="lost expert-0: no acknowledgement for"):
            home.receive("expert-0", rows_frame(), time.monotonic() + LIMIT_S)
    close(home, expert)


def test_a_host_that_does_not_answer_a_connection_is_lost_soon() -> None:
    home, expert = (make_connections(r, 0, path_limit_s=0.5) for r in ("attention", "expert"))
    with socket.create_server(("127.0.0.1", 0)) as mute:
        lose_all_to(mute)
        host, port = mute.getsockname()
        silent = replace(member(expert), data_address=f"{host}:{port}")
        there = Generation(number=1, members=(member(home), silent))
        with pytest.raises(PeerLostError, match=r"expert-0: cannot connect: no answer within 0.5"):
            home.apply_generation(there)
    close(home, expert)


def close(*all_connections: PeerConnections) -> None:
    for connections in all_connections:
        connections.close()
