"""Edges of real peer connections: opening, refusing, closing, waking, rubbish on the port."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from msgspec.structs import replace

from benchmarks.harness.mesh import MAX_ROWS, Mesh, make_bank, make_connections
from benchmarks.harness.stalls import wait_until
from cluster.core.errors import GenerationChangedError, PeerLostError
from cluster.core.topology import Generation, Member, Role
from tests.fakes import Wakeups
from workers.transport.acceptor import MAX_PENDING
from workers.transport.frames import FrameHeader, FrameKind, max_data_bytes
from workers.transport.peer_connections import PeerConnections

LIMIT_S = 60.0
"""Longest wait for anything, on a machine that is busy with other work."""
MAX_BYTES = max_data_bytes([make_bank()], MAX_ROWS, 4, "sum")
"""Of a data frame, unless a test says otherwise."""


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as executor:
        yield executor


class OpenPeer:
    """Makes peer connections and closes them."""

    def __init__(self) -> None:
        self.made: list[PeerConnections] = []

    def __call__(self, role: Role, rank: int, **options: Any) -> PeerConnections:
        connections = make_connections(role, rank, **options)
        self.made.append(connections)
        return connections


@pytest.fixture
def open_peer() -> Iterator[OpenPeer]:
    made = OpenPeer()
    yield made
    for connections in made.made:
        connections.close()


def member(connections: PeerConnections) -> Member:
    me = connections.me
    return Member(name=me.name, role=me.role, rank=me.rank, data_address=connections.address)


def form(pool: ThreadPoolExecutor, number: int, *all_connections: PeerConnections) -> Generation:
    """All of them apply a generation at the same time."""
    generation = Generation(number=number, members=tuple(member(h) for h in all_connections))
    for future in [pool.submit(h.apply_generation, generation) for h in all_connections]:
        future.result(LIMIT_S)
    return generation


def apply(
    pool: ThreadPoolExecutor, one: PeerConnections, generation: Generation, other: PeerConnections
) -> None:
    """One worker applies a generation while the loop of the other one runs."""
    applied = pool.submit(one.apply_generation, generation)
    deadline = time.monotonic() + LIMIT_S
    while not applied.done() and time.monotonic() < deadline:
        other.poll(0.01)
    applied.result(0)


Pair = tuple[PeerConnections, PeerConnections]


@pytest.fixture
def pair(open_peer: OpenPeer, pool: ThreadPoolExecutor) -> Pair:
    """An attention worker and an expert worker in generation 1."""
    home, expert = open_peer("attention", 0), open_peer("expert", 0)
    form(pool, 1, home, expert)
    return home, expert


def until(connections: PeerConnections, ready: Callable[[], bool]) -> None:
    connections.wait(ready, lambda: ["nobody"], timeout_s=LIMIT_S)


def rows_frame(generation: int = 1, step: int = 1, length: int = 0, **more: Any) -> FrameHeader:
    return FrameHeader(FrameKind.ROWS, generation, step, length=length, **more)


def num_refused(caplog: pytest.LogCaptureFixture) -> int:
    """Connections that did not become an edge."""
    return sum(" refused: " in message for message in caplog.messages)


def exchange(home: PeerConnections, expert: PeerConnections, step: int, generation: int) -> None:
    """One data frame arrives."""
    header = rows_frame(generation, step, 3)
    home.send(expert.me.name, header, [b"abc"])
    frame = expert.receive(home.me.name, header, time.monotonic() + LIMIT_S)
    assert frame.payload.tobytes() == b"abc"


def test_attention_ranks_share_edges_with_all_and_experts_only_with_attention(
    open_peer: OpenPeer, pool: ThreadPoolExecutor
) -> None:
    everyone = [open_peer("attention", r) for r in range(3)] + [
        open_peer("expert", r) for r in range(2)
    ]
    form(pool, 1, *everyone)
    for connections in everyone[:3]:
        assert set(connections.edges) == {h.me.name for h in everyone} - {connections.me.name}
    for connections in everyone[3:]:
        assert set(connections.edges) == {"attention-0", "attention-1", "attention-2"}


def test_survivors_keep_their_edge_and_stale_frames_are_dropped(
    open_peer: OpenPeer, pool: ThreadPoolExecutor
) -> None:
    home, expert, lost = (
        open_peer("attention", 0),
        open_peer("expert", 0),
        open_peer("expert", 1),
    )
    form(pool, 1, home, expert, lost)
    kept = home.edges["expert-0"].sock, expert.edges["attention-0"].sock
    home.send("expert-0", rows_frame(1, 7, 4), [b"late"])
    until(expert, lambda: bool(expert.edges["attention-0"].inbox))
    home.send("expert-0", rows_frame(1, 8, 5), [b"later"])
    form(pool, 2, home, expert)
    assert (home.edges["expert-0"].sock, expert.edges["attention-0"].sock) == kept
    assert "expert-1" not in home.edges
    exchange(home, expert, 6, 2)  # an earlier step than those of the dropped frames


def test_an_edge_that_breaks_between_two_generations_is_opened_again(
    pair: Pair, pool: ThreadPoolExecutor
) -> None:
    home, expert = pair
    old = home.edges["expert-0"].sock
    old.shutdown(socket.SHUT_RDWR)
    time.sleep(0.05)
    form(pool, 2, home, expert)
    assert home.edges["expert-0"].sock is not old
    exchange(home, expert, 1, 2)
    home.check()


def test_a_peer_that_was_held_back_is_read_again_in_a_new_generation(
    pair: Pair, pool: ThreadPoolExecutor
) -> None:
    home, expert = pair
    for step in range(1, 12):
        home.send("expert-0", rows_frame(1, step, MAX_BYTES), [bytes(MAX_BYTES)])
        home.poll()
        expert.poll()
    while expert.edges["attention-0"].interest:
        home.poll(0.01)
        expert.poll(0.01)
    form(pool, 2, home, expert)
    exchange(home, expert, 0, 2)  # before the steps of the dropped frames


def test_an_edge_that_only_its_peer_has_closed_is_opened_again_before_the_steps_begin(
    pair: Pair, pool: ThreadPoolExecutor
) -> None:
    """The end of the connection arrives when this worker has said that it is ready."""
    home, expert = pair
    next_one = replace(home.generation, number=2)
    home.apply_generation(next_one)  # the edge seems to be open
    expert.edges["attention-0"].sock.shutdown(socket.SHUT_RDWR)
    applied = pool.submit(expert.apply_generation, next_one)
    while not applied.done():
        home.poll_idle(0.01, is_ready=True)
    applied.result(0)
    home.check()
    exchange(home, expert, 1, 2)


def test_rest_ignores_a_lost_peer_but_not_a_new_generation(pair: Pair) -> None:
    home, expert = pair
    expert.close()
    home.poll_idle(0.1)
    home.poll_idle(0.1)
    with pytest.raises(PeerLostError):
        home.check()
    home.interrupt(2)
    with pytest.raises(GenerationChangedError):
        home.poll_idle(0.1)


def test_a_joining_worker_gets_its_edges(
    pair: Pair, open_peer: OpenPeer, pool: ThreadPoolExecutor
) -> None:
    home, expert = pair
    old = home.edges["expert-0"].sock
    other, new = open_peer("expert", 1), open_peer("attention", 1)
    form(pool, 2, home, expert, other, new)
    assert home.edges["expert-0"].sock is old
    assert set(home.edges) == {"expert-0", "expert-1", "attention-1"}
    exchange(new, other, 1, 2)


def test_an_early_connection_waits_until_the_listener_follows(
    open_peer: OpenPeer, pool: ThreadPoolExecutor
) -> None:
    home, expert = open_peer("attention", 0), open_peer("expert", 0)
    generation = Generation(number=5, members=(member(home), member(expert)))
    apply(pool, home, generation, expert)
    assert not expert.edges
    expert.apply_generation(generation)
    exchange(home, expert, 1, 5)


def test_frames_of_an_older_step_are_dropped(pair: Pair) -> None:
    home, expert = pair
    expert.begin_step(4)
    for step in (3, 4):
        home.send("expert-0", rows_frame(1, step), [])
    inbox = expert.edges["attention-0"].inbox
    until(expert, lambda: bool(inbox))
    assert [frame.header.step for frame in inbox] == [4]


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (rows_frame(generation=9), "generation 9, this is 2"),
        (rows_frame(generation=1), "generation 1 on an edge of 2"),
        (rows_frame(2, length=1 << 31), "at most"),
        (FrameHeader(FrameKind.OUTPUTS, 2, 1), "OUTPUTS frame from a worker of role attention"),
        (rows_frame(2, 1, bank=7), "bank 7 .* instead of"),
    ],
)
def test_nonsense_closes_the_edge_and_names_the_reason(
    open_peer: OpenPeer, pool: ThreadPoolExecutor, header: FrameHeader, reason: str
) -> None:
    home, expert = open_peer("attention", 0), open_peer("expert", 0)
    form(pool, 2, home, expert)
    home.edges["expert-0"].sock.sendall(header.encode())
    with pytest.raises(PeerLostError, match=reason) as caught:
        expert.receive("attention-0", rows_frame(2), time.monotonic() + LIMIT_S)
    assert caught.value.peer == "attention-0"
    with pytest.raises(PeerLostError, match="closed by the peer"):
        until(home, lambda: False)


def test_rubbish_after_the_handshake_closes_the_edge(pair: Pair) -> None:
    home, expert = pair
    home.edges["expert-0"].sock.sendall(b"\x00\xff" * 40)
    with pytest.raises(PeerLostError, match="magic"):
        until(expert, lambda: False)


def test_a_truncated_frame_ends_with_the_edge(pair: Pair) -> None:
    home, expert = pair
    sock = home.edges["expert-0"].sock
    sock.sendall(rows_frame(1, 1, 100).encode() + b"only this")
    threading.Timer(0.1, lambda: sock.shutdown(socket.SHUT_RDWR)).start()
    with pytest.raises(PeerLostError, match="closed by the peer"):
        expert.receive("attention-0", rows_frame(), time.monotonic() + LIMIT_S)


def test_a_peer_that_dies_is_noticed_at_once(pair: Pair) -> None:
    home, expert = pair
    threading.Timer(0.1, expert.edges["attention-0"].sock.shutdown, (socket.SHUT_RDWR,)).start()
    with pytest.raises(PeerLostError, match="expert-0: closed by the peer"):
        until(home, lambda: False)


def test_a_wait_for_a_frame_says_for_whom_it_waits(pair: Pair, pool: ThreadPoolExecutor) -> None:
    home, expert = pair
    wait = pool.submit(expert.receive, "attention-0", rows_frame(), time.monotonic() + LIMIT_S)
    wait_until(lambda: expert.loop.awaited == ("attention-0",), "the wait")
    home.send("expert-0", rows_frame(), [])
    wait.result(LIMIT_S)
    assert expert.loop.awaited == ()


def test_a_wait_ends_by_its_time_limit_and_names_the_peer(pair: Pair) -> None:
    _, expert = pair
    with pytest.raises(PeerLostError, match="attention-0: no ROWS of step 1 in time"):
        expert.receive("attention-0", rows_frame(), time.monotonic() + 0.1)


def test_an_edge_that_cannot_open_names_the_peer(open_peer: OpenPeer) -> None:
    home = open_peer("attention", 0)
    gone = open_peer("expert", 0)
    nobody = replace(member(gone), name="expert-9", rank=9)
    expert = open_peer("expert", 1, connect_timeout_s=0.2)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    nobody = replace(nobody, data_address=address)
    with pytest.raises(PeerLostError, match="expert-9"):
        home.apply_generation(Generation(number=1, members=(member(home), nobody)))
    with pytest.raises(PeerLostError, match=r"attention-0: no edge within 0\.2 s"):
        expert.apply_generation(Generation(number=1, members=(member(home), member(expert))))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"token": "wrong"}, "lost expert-0: .* same cluster token"),
        ({"checkpoint_id": "other"}, "checkpoint of attention-0 is other, expert-0 has checkpoint"),
        ({"config_hash": "other"}, "configuration of attention-0 is other, expert-0 has config"),
    ],
)
def test_a_stranger_is_refused_and_the_listener_still_serves(
    open_peer: OpenPeer,
    pool: ThreadPoolExecutor,
    caplog: pytest.LogCaptureFixture,
    options: dict[str, str],
    reason: str,
) -> None:
    expert, stranger = open_peer("expert", 0), open_peer("attention", 0, **options)
    home = open_peer("attention", 0)
    generation = Generation(number=1, members=(member(home), member(expert)))
    serving = pool.submit(expert.apply_generation, generation)
    with pytest.raises(PeerLostError, match=reason):
        stranger.apply_generation(generation)
    home.apply_generation(generation)
    serving.result(LIMIT_S)
    assert num_refused(caplog) >= 1
    exchange(home, expert, 1, 1)


def test_a_worker_of_an_older_generation_waits_for_the_next(
    open_peer: OpenPeer, pool: ThreadPoolExecutor
) -> None:
    home, expert, late = (
        open_peer("attention", 0),
        open_peer("expert", 0),
        open_peer("attention", 1),
    )
    form(pool, 4, home, expert)
    joining = Generation(number=3, members=(member(late), member(expert)))
    words = "generation of attention-1 is 3, expert-0 is in 4"
    with pytest.raises(GenerationChangedError, match=words):
        apply(pool, late, joining, expert)
    exchange(home, expert, 1, 4)


def test_a_worker_that_is_not_a_member_is_refused(
    open_peer: OpenPeer, pool: ThreadPoolExecutor
) -> None:
    home, expert, other = (
        open_peer("attention", 0),
        open_peer("expert", 0),
        open_peer("attention", 1),
    )
    form(pool, 1, home, expert)
    joining = Generation(number=1, members=(member(other), member(expert)))
    words = "lost expert-0: .* attention-1 rank 1 is not a member of generation 1"
    with pytest.raises(PeerLostError, match=words):
        apply(pool, other, joining, expert)


def test_another_worker_at_the_address_is_refused(
    open_peer: OpenPeer, pool: ThreadPoolExecutor
) -> None:
    home, expert = open_peer("attention", 0), open_peer("expert", 0)
    wrong = replace(member(expert), name="expert-5", rank=5)
    generation = Generation(number=1, members=(member(home), wrong))
    with pytest.raises(PeerLostError, match="lost expert-5: expert-0 answered at its address"):
        apply(pool, home, generation, expert)


def test_rubbish_and_silence_on_the_port_end_one_connection_only(
    open_peer: OpenPeer, pool: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    home, expert = open_peer("attention", 0), open_peer("expert", 0, connect_timeout_s=1.0)
    form(pool, 1, home, expert)
    host, port = expert.address.split(":")
    silent = socket.create_connection((host, int(port)))
    slow = socket.create_connection((host, int(port)))
    slow.sendall(b"EM")
    for rubbish in (b"\x00" * 5000, b"GET / HTTP/1.0\r\n\r\n", b"EMhs\xff\xff", b"EMdp" * 20):
        with socket.create_connection((host, int(port))) as sock:
            sock.sendall(rubbish)
            until(expert, lambda: True)
            closed = pool.submit(_read_to_end, sock)
            while not closed.done():
                expert.poll(0.01)
    until(expert, lambda: num_refused(caplog) >= 6)  # the silent ones by their time limit
    exchange(home, expert, 1, 1)
    silent.close()
    slow.close()


def _read_to_end(sock: socket.socket) -> None:
    sock.settimeout(LIMIT_S)
    try:
        while sock.recv(4096):
            pass
    except ConnectionResetError:
        return


def test_connections_without_a_token_are_bounded(
    open_peer: OpenPeer, pool: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    home, expert = open_peer("attention", 0), open_peer("expert", 0)
    host, port = expert.address.split(":")
    crowd = [socket.create_connection((host, int(port))) for _ in range(MAX_PENDING + 32)]
    form(pool, 1, home, expert)
    assert num_refused(caplog) >= 32
    exchange(home, expert, 1, 1)
    for sock in crowd:
        sock.close()


def test_interrupt_ends_a_wait_and_stays_until_the_generation_is_applied(
    pair: Pair, pool: ThreadPoolExecutor
) -> None:
    home, expert = pair
    threading.Timer(0.1, home.interrupt, (2,)).start()
    with pytest.raises(GenerationChangedError):
        until(home, lambda: False)
    with pytest.raises(GenerationChangedError):
        home.check()
    form(pool, 2, home, expert)
    home.check()


def test_an_interrupt_for_a_later_generation_ends_the_opening_of_edges(
    open_peer: OpenPeer,
) -> None:
    home, expert = open_peer("attention", 0), open_peer("expert", 0)
    threading.Timer(0.1, expert.interrupt, (2,)).start()
    with pytest.raises(GenerationChangedError, match="generation 2"):
        expert.apply_generation(Generation(number=1, members=(member(home), member(expert))))


def test_large_frames_cross_without_deadlock(open_peer: OpenPeer, pool: ThreadPoolExecutor) -> None:
    first = open_peer("attention", 0, frame_bytes=64 << 20)
    second = open_peer("expert", 0, frame_bytes=64 << 20)
    form(pool, 1, first, second)
    payload = bytes(range(256)) * (1 << 17)  # 32 MiB

    def swap(me: PeerConnections, other: PeerConnections, out: FrameKind, back: FrameKind) -> bytes:
        deadline = time.monotonic() + LIMIT_S
        me.send(other.me.name, FrameHeader(out, 1, 1, length=len(payload)), [payload])
        frame = me.receive(other.me.name, FrameHeader(back, 1, 1), deadline)
        until(me, lambda: me.edges[other.me.name].out_bytes == 0)
        return frame.payload.tobytes()

    futures: list[Future[bytes]] = [
        pool.submit(swap, first, second, FrameKind.ROWS, FrameKind.OUTPUTS),
        pool.submit(swap, second, first, FrameKind.OUTPUTS, FrameKind.ROWS),
    ]
    for future in futures:
        assert future.result(LIMIT_S) == payload


def test_an_unread_inbox_stops_the_reading_not_the_peer(pair: Pair) -> None:
    home, expert = pair
    for step in range(1, 12):
        home.send("expert-0", rows_frame(1, step, MAX_BYTES), [bytes(MAX_BYTES)])
    for _ in range(50):
        home.poll(0.001)
        expert.poll(0.001)
    edge = expert.edges["attention-0"]
    assert edge.inbox_bytes <= 6 * MAX_BYTES
    for step in range(1, 12):
        deadline = time.monotonic() + LIMIT_S
        frame = expert.receive("attention-0", rows_frame(1, step), deadline)
        assert len(frame.payload) == MAX_BYTES
        home.poll()


def test_an_idle_hub_sleeps(pair: Pair) -> None:
    home, expert = pair
    for connections in (home, expert):
        wakeups, cpu = Wakeups(connections), time.thread_time()
        connections.poll(0.5)
        assert wakeups.count <= 2
        assert time.thread_time() - cpu < 0.25


def test_unknown_ranks_and_closed_edges_are_named(pair: Pair) -> None:
    home, _ = pair
    with pytest.raises(PeerLostError, match="no edge"):
        home.send("expert-7", rows_frame(), [])
    with pytest.raises(PeerLostError, match="nonsense"):
        home.reject("expert-0", "nonsense")
    with pytest.raises(PeerLostError, match="nonsense"):
        home.check()


def test_a_generation_that_was_left_ends_all_waits_until_the_next(
    pair: Pair, pool: ThreadPoolExecutor
) -> None:
    home, expert = pair
    home.leave(1)
    with pytest.raises(GenerationChangedError, match="generation 1 was left"):
        home.poll()
    home.poll_idle(0.0)
    form(pool, 2, home, expert)
    home.poll()
    home.leave(1)
    home.poll()


@pytest.mark.parametrize(("num_cores", "spins"), [(2, False), (3, True)])
def test_exchanges_spin_where_a_core_is_spare(
    monkeypatch: pytest.MonkeyPatch, num_cores: int, spins: bool
) -> None:
    """Two workers with a thread each; the third one is on another host."""
    with Mesh(1, 1, [make_bank()]) as mesh:
        connections = mesh["attention-0"].connections
        far = replace(mesh.generation.experts[0], name="far", data_address="10.0.0.9:1")
        members = (*mesh.generation.members, far)
        connections.generation = replace(mesh.generation, members=members)
        cores = set(range(num_cores))
        monkeypatch.setattr("os.sched_getaffinity", lambda pid: cores)
        direct = connections.direct(["expert-0"])
        assert direct is not None
        assert bool(direct.waiting.spin_ns) is spins
