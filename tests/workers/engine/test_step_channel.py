"""The step protocol between real peer connections: headers, the doorbell, idling, nonsense."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from benchmarks.harness.mesh import make_connections
from benchmarks.harness.stalls import wait_until
from cluster.core.errors import GenerationChangedError, PeerLostError
from cluster.core.topology import Generation, Member
from tests.fakes import Wakeups
from workers.engine import step_leader
from workers.engine.micro_batches import MicroBatchRule
from workers.engine.prefill_cap import PrefillCap
from workers.engine.step_channel import StepChannel
from workers.engine.step_leader import StepLeader
from workers.engine.step_proposals import PROPOSALS, StepProposal, StepProposals
from workers.requests.step_header import HEADERS, Grant, Grants, StepHeader
from workers.scheduling.step_plan import RowsWanted
from workers.transport.frames import FrameHeader, FrameKind
from workers.transport.peer_connections import PeerConnections

LIMIT_S = 60.0
"""Longest wait for anything, on a machine that is busy with other work."""


class Cluster:
    """A attention and E expert channels of one generation."""

    def __init__(self, num_attention: int, num_experts: int) -> None:
        self.all_connections = [make_connections("attention", r) for r in range(num_attention)]
        self.all_connections += [make_connections("expert", r) for r in range(num_experts)]
        self.pool = ThreadPoolExecutor(len(self.all_connections))
        self.open_channels(PrefillCap(max_rows=64))
        self.start(1, self.all_connections, first_step=1)

    def open_channels(
        self,
        leaders_cap: PrefillCap,
        *,
        max_static_ranks: int = 0,
        buckets: Sequence[int] = (),
        micro_batches: MicroBatchRule | None = None,
    ) -> None:
        """New channels on the same connections; only the first one leads."""
        caps = [leaders_cap, *(PrefillCap(max_rows=1) for _ in self.all_connections[1:])]
        self.channels = [
            StepChannel(
                h,
                StepLeader(
                    prefill_cap=c,
                    micro_batches=micro_batches or MicroBatchRule(),
                    buckets=buckets,
                    max_static_ranks=max_static_ranks,
                ),
            )
            for h, c in zip(self.all_connections, caps, strict=True)
        ]

    def start(self, number: int, all_connections: list[PeerConnections], first_step: int) -> None:
        """What NewGeneration and RunGeneration do."""
        members = tuple(
            Member(name=h.me.name, role=h.me.role, rank=h.me.rank, data_address=h.address)
            for h in all_connections
        )
        generation = Generation(number=number, members=members)
        for future in [self.pool.submit(h.apply_generation, generation) for h in all_connections]:
            future.result(2 * LIMIT_S)
        for connections, channel in zip(self.all_connections, self.channels, strict=True):
            if connections in all_connections:
                channel.start_generation(first_step, epoch=number)

    def wait_all(self, timeout_s: float = LIMIT_S) -> list[StepHeader | None]:
        futures = [self.pool.submit(c.wait, timeout_s) for c in self.channels]
        return [f.result(2 * LIMIT_S) for f in futures]

    def close(self) -> None:
        for connections in self.all_connections:
            connections.close()
        self.pool.shutdown()


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    made = Cluster(2, 2)
    yield made
    made.close()


def test_everyone_gets_the_same_header_once_all_have_reported(cluster: Cluster) -> None:
    leader, other = cluster.channels[:2]
    assert leader.is_leader
    assert not other.is_leader
    leader.propose(RowsWanted(3, 0))
    assert leader.wait(0.05) is None
    other.propose(RowsWanted(1, 5))
    headers = cluster.wait_all()
    assert headers[0] is not None
    assert headers.count(headers[0]) == 4
    assert headers[0].grants == Grants.of(
        {0: Grant(decode_rows=3), 1: Grant(decode_rows=1, prefill_rows=5)}
    )
    assert (headers[0].step, headers[0].epoch, headers[0].exact) == (1, 1, True)


@pytest.mark.parametrize(("max_static_ranks", "exact"), [(1, True), (2, False)])
def test_few_expert_ranks_get_all_rows_of_prompts(
    cluster: Cluster, max_static_ranks: int, exact: bool
) -> None:
    cluster.open_channels(PrefillCap(max_rows=64), max_static_ranks=max_static_ranks)
    cluster.start(2, cluster.all_connections, first_step=1)
    leader, other = cluster.channels[:2]
    leader.propose(RowsWanted(3, 0))
    other.propose(RowsWanted(1, 5))
    (header,) = set(cluster.wait_all())
    assert header is not None
    assert (header.exact, header.bucket) == (exact, 0)


def test_without_rows_steps_of_padding_are_captured_the_largest_first(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that a step with rows has captured is left out, and each generation begins anew."""
    monkeypatch.setattr(step_leader, "_QUIET_S", 0.0)
    halves = MicroBatchRule(setting="auto", decode_threshold=6)
    cluster.open_channels(PrefillCap(max_rows=64), buckets=(1, 2, 4, 8), micro_batches=halves)

    def next_header(wanted: int) -> StepHeader | None:
        for channel in cluster.channels[:2]:
            channel.propose(RowsWanted(wanted, 0))
        (header,) = set(cluster.wait_all(LIMIT_S if wanted else 0.3))
        return header

    def next_size() -> tuple[int, int, int] | None:
        header = next_header(0)
        if header is None:
            return None
        return header.bucket, header.num_micro_batches, header.decode_rows + header.edge_limit

    for number in (2, 3):
        cluster.start(number, cluster.all_connections, first_step=1)
        assert next_size() == (4, 2, 0)
        header = next_header(2)
        assert header is not None
        assert header.bucket == 2
        sizes = [next_size() for _ in range(4)]
        assert sizes == [(8, 1, 0), (4, 1, 0), (1, 1, 0), None]


def test_steps_of_padding_wait_until_there_are_no_rows_for_a_while(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.open_channels(PrefillCap(max_rows=64), buckets=(1, 2))
    cluster.start(2, cluster.all_connections, first_step=1)

    def next_header(wanted: int) -> StepHeader | None:
        for channel in cluster.channels[:2]:
            channel.propose(RowsWanted(wanted, 0))
        (header,) = set(cluster.wait_all(LIMIT_S if wanted else 0.1))
        return header

    assert next_header(0) is None
    assert next_header(1) is not None
    monkeypatch.setattr(step_leader, "_QUIET_S", 0.0)
    header = next_header(0)
    assert header is not None
    assert header.bucket == 2


def test_a_wait_for_a_header_says_for_whom_it_waits(cluster: Cluster) -> None:
    leader, other = cluster.channels[:2]
    first, second = cluster.all_connections[:2]
    leader.propose(RowsWanted(1, 0))
    other.propose(RowsWanted(0, 0))
    cluster.wait_all()
    leader.propose(RowsWanted(1, 0))
    for channel, connections, name in (
        (leader, first, "attention-1"),
        (other, second, "attention-0"),
    ):
        wait = cluster.pool.submit(channel.wait, LIMIT_S)
        _wait_until_awaited(connections, name)
        connections.wake()
        assert wait.result(LIMIT_S) is None
        assert connections.loop.awaited == ()


def _wait_until_awaited(connections: PeerConnections, name: str) -> None:
    wait_until(lambda: connections.loop.awaited == (name,), f"a wait for {name}")


def test_steps_are_numbered_on_and_on(cluster: Cluster) -> None:
    for step in range(1, 30):
        cluster.channels[0].propose(RowsWanted(step % 3, 0))
        cluster.channels[1].propose(RowsWanted(1, 0))
        headers = cluster.wait_all()
        assert [h.step for h in headers if h] == [step] * 4
    assert cluster.channels[3].highest_step == 29
    assert cluster.channels[3].highest_epoch == 1


def test_each_rank_has_its_own_cap_while_any_decodes(cluster: Cluster) -> None:
    granted = []
    for decodes in (0, 1):
        cluster.channels[0].propose(RowsWanted(decodes, 64))
        cluster.channels[1].propose(RowsWanted(0, 64))
        (header,) = set(cluster.wait_all())
        assert header is not None
        granted.append(header.prefill_rows)
    assert granted == [128, 128]


def test_the_leader_learns_from_its_steps(cluster: Cluster) -> None:
    """Decodes take longer than the target, so that prompts get the least from the next step on."""
    cluster.open_channels(PrefillCap(max_rows=64, min_rows=4, target_s=1e-9))
    for channel in cluster.channels:
        channel.start_generation(first_step=1, epoch=1)
    granted = []
    for _ in range(3):
        cluster.channels[0].propose(RowsWanted(1, 64))
        cluster.channels[1].propose(RowsWanted(1, 64))
        (header,) = set(cluster.wait_all())
        assert header is not None
        granted.append(header.prefill_rows)
    assert granted == [8, 4, 4]


def test_no_step_runs_without_work(cluster: Cluster) -> None:
    cluster.channels[0].propose(RowsWanted(0, 0))
    cluster.channels[1].propose(RowsWanted(0, 0))
    wakeups = [Wakeups(connections) for connections in cluster.all_connections]
    assert cluster.wait_all(0.3) == [None] * 4
    assert max(w.count for w in wakeups) <= 3


def test_a_leader_may_have_a_step_without_rows(cluster: Cluster) -> None:
    """It proves to all of them that their generation lives."""
    leader, other = cluster.channels[:2]
    other.propose(RowsWanted(0, 0), even_empty=True)  # means nothing on a rank that does not lead
    leader.propose(RowsWanted(0, 0))
    assert leader.wait(0.05) is None
    leader.propose(RowsWanted(0, 0), even_empty=True)
    (header,) = set(cluster.wait_all())
    assert header is not None
    assert header.grants == Grants.of({0: Grant(), 1: Grant()})
    assert (header.num_micro_batches, header.exact) == (1, False)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_doorbell_starts_a_step_at_once(cluster: Cluster, rank: int) -> None:
    for channel in cluster.channels[:2]:
        channel.propose(RowsWanted(0, 0))
    start = time.monotonic()

    def attention(index: int) -> StepHeader | None:
        channel = cluster.channels[index]
        header = channel.wait(LIMIT_S)
        if header is None and index == rank:
            channel.propose(RowsWanted(0, 7))
            header = channel.wait(LIMIT_S)
        return header

    futures = [cluster.pool.submit(attention, i) for i in (0, 1)]
    futures += [cluster.pool.submit(c.wait, LIMIT_S) for c in cluster.channels[2:]]
    threading.Timer(0.2, cluster.all_connections[rank].wake).start()
    headers = [f.result(2 * LIMIT_S) for f in futures]
    assert all(h is not None and h.grant(rank) == Grant(prefill_rows=7) for h in headers)
    assert time.monotonic() - start < LIMIT_S


def test_a_proposal_that_crosses_the_header_waits_for_the_next_step(cluster: Cluster) -> None:
    leader, other = cluster.channels[:2]
    other.propose(RowsWanted(0, 0))
    leader.propose(RowsWanted(2, 0))
    assert leader.wait(LIMIT_S) is not None  # published with other's zero rows
    other.propose(RowsWanted(0, 9))  # too late for step 1
    header = other.wait(LIMIT_S)
    assert header is not None
    assert header.grant(1) == Grant()
    leader.propose(RowsWanted(0, 0))
    other.propose(RowsWanted(0, 9))
    headers = [leader.wait(LIMIT_S), other.wait(LIMIT_S)]
    assert all(h is not None and h.grant(1) == Grant(prefill_rows=9) for h in headers)


def test_wake_ends_a_wait_without_a_header(cluster: Cluster) -> None:
    channel = cluster.channels[2]
    start = time.monotonic()
    threading.Timer(0.1, cluster.all_connections[2].wake).start()
    assert channel.wait(LIMIT_S) is None
    assert time.monotonic() - start < LIMIT_S


def test_a_wake_before_the_wait_is_not_lost(cluster: Cluster) -> None:
    cluster.all_connections[0].wake()
    start = time.monotonic()
    assert cluster.channels[0].wait(LIMIT_S) is None
    assert time.monotonic() - start < LIMIT_S


def test_interrupt_and_loss_end_a_wait(cluster: Cluster) -> None:
    threading.Timer(0.1, cluster.all_connections[2].interrupt, (2,)).start()
    with pytest.raises(GenerationChangedError):
        cluster.channels[2].wait(LIMIT_S)
    cluster.all_connections[3].close()
    with pytest.raises(PeerLostError, match="expert-1"):
        cluster.channels[0].wait(LIMIT_S)


def test_a_new_generation_has_a_new_leader_and_goes_on_above(cluster: Cluster) -> None:
    for channel in cluster.channels[:2]:
        channel.propose(RowsWanted(1, 0))
    assert None not in cluster.wait_all()
    cluster.channels[1].propose(RowsWanted(4, 0))  # of the old generation: forgotten
    cluster.start(2, cluster.all_connections[1:], first_step=8)
    leader = cluster.channels[1]
    assert leader.is_leader
    assert leader.wait(0.05) is None
    leader.propose(RowsWanted(2, 0))
    headers = [c.wait(LIMIT_S) for c in cluster.channels[1:]]
    assert all(h is not None and (h.generation, h.step, h.epoch) == (2, 8, 2) for h in headers)
    assert headers[0] is not None
    assert headers[0].grants == Grants.of({1: Grant(decode_rows=2)})


def send(
    connections: PeerConnections, name: str, kind: FrameKind, data: bytes, step: int = 1
) -> None:
    connections.send(name, FrameHeader(kind, 1, step, length=len(data)), [data])


def make_proposal(rank: int = 1, step: int = 1) -> StepProposals:
    proposal = StepProposal.of(rank, RowsWanted(decode_rows=1))
    return StepProposals(generation=1, step=step, proposals=(proposal,))


@pytest.mark.parametrize(
    ("data", "step", "reason"),
    [
        (b"short", 1, "not a step proposal"),
        (PROPOSALS.encode(make_proposal(rank=0)), 1, r"ranks \[0\] from attention-1"),
        (PROPOSALS.encode(make_proposal(step=9)), 9, "step 9: must be 1"),
        (PROPOSALS.encode(make_proposal(step=2)), 1, "different steps"),
    ],
)
def test_a_wrong_proposal_closes_the_edge(
    cluster: Cluster, data: bytes, step: int, reason: str
) -> None:
    send(cluster.all_connections[1], "attention-0", FrameKind.PROPOSAL, data, step)
    with pytest.raises(PeerLostError, match=reason):
        cluster.channels[0].wait(LIMIT_S)


@pytest.mark.parametrize(
    ("sender", "ranks", "step", "reason"),
    [
        (1, (0, 1), 1, "from attention-1: must be from attention-0"),
        (0, (0, 1), 3, "step header 3: must be 1"),
        (0, (0, 1, 2), 1, "grants ranks"),
    ],
)
def test_a_wrong_header_closes_the_edge(
    cluster: Cluster, sender: int, ranks: tuple[int, ...], step: int, reason: str
) -> None:
    header = StepHeader(
        generation=1,
        step=step,
        epoch=1,
        oldest_epoch=1,
        grants=Grants.of({r: Grant(decode_rows=1) for r in ranks}),
    )
    send(
        cluster.all_connections[sender], "expert-0", FrameKind.HEADER, HEADERS.encode(header), step
    )
    with pytest.raises(PeerLostError, match=reason):
        cluster.channels[2].wait(LIMIT_S)


def test_a_new_epoch_begins_with_an_empty_step_without_work(cluster: Cluster) -> None:
    leader, other = cluster.channels[:2]
    leader.propose(RowsWanted(0, 0))
    other.propose(RowsWanted(0, 0))
    assert leader.wait(0.05) is None
    leader.set_epoch(4, 4)
    leader.propose(RowsWanted(0, 0))
    (header,) = set(cluster.wait_all())
    assert header is not None
    assert (header.step, header.epoch, header.oldest_epoch) == (1, 4, 4)
    assert (header.decode_rows, header.prefill_rows) == (0, 0)
    for channel in cluster.channels[:2]:
        channel.propose(RowsWanted(0, 0))
    assert leader.wait(0.05) is None
    assert [c.highest_epoch for c in cluster.channels] == [4, 4, 4, 4]


def test_a_new_epoch_begins_with_the_next_step_with_work(cluster: Cluster) -> None:
    for epoch in (1, 2, 2, 3):
        cluster.channels[0].set_epoch(epoch, epoch)
        cluster.channels[0].propose(RowsWanted(1, 0))
        cluster.channels[1].propose(RowsWanted(0, 0))
        (header,) = set(cluster.wait_all())
        assert header is not None
        assert header.epoch == epoch
        assert header.decode_rows == 1


def test_a_rank_names_the_workers_for_which_the_next_step_waits(cluster: Cluster) -> None:
    leader, other = cluster.channels[:2]
    assert leader.missing_workers() == ["attention-0", "attention-1"]
    leader.propose(RowsWanted(3, 0))
    assert leader.missing_workers() == ["attention-1"]
    assert other.missing_workers() == ["attention-0"]
    assert leader.last_rows == 0
    other.propose(RowsWanted(1, 5))
    cluster.wait_all()
    assert leader.last_rows == other.last_rows == 9
