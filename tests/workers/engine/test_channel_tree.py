"""The step protocol in a cluster with a second hop between the leader and some workers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.harness.stalls import wait_until
from cluster.core.errors import PeerLostError
from tests.workers.engine.test_step_channel import LIMIT_S, Cluster, make_proposal, send
from workers.engine.step_proposals import PROPOSALS, StepProposals
from workers.requests.step_header import HEADERS, Grant, Grants, StepHeader
from workers.scheduling.step_plan import RowsWanted
from workers.transport.frames import FrameKind

LEAF, ITS_PARENT = 4, 1
EXPERT_OF_PARENT = 7 + 0

NOTHING = StepProposals(generation=1, step=1, proposals=())


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """Ranks 1 to 3 are below the leader; 4 and expert 0 are below rank 1, 6 below rank 3."""
    made = Cluster(7, 4)
    yield made
    made.close()


def propose(cluster: Cluster, *ranks: int) -> None:
    for rank in ranks:
        cluster.channels[rank].propose(RowsWanted(rank, 0))


def step(cluster: Cluster) -> StepHeader:
    """All ranks propose their number, those at the leaves first."""
    propose(cluster, *reversed(range(7)))
    headers = cluster.wait_all()
    assert headers[0] is not None
    assert headers.count(headers[0]) == len(cluster.channels)
    return headers[0]


def test_everyone_gets_the_same_headers(cluster: Cluster) -> None:
    for number in range(1, 6):
        header = step(cluster)
        assert header.step == number
        assert header.grants == Grants.of({r: Grant(decode_rows=r) for r in range(7)})


def test_a_leaf_that_proposes_again_is_heard(cluster: Cluster) -> None:
    for channel in cluster.channels[:7]:
        channel.propose(RowsWanted())
    assert cluster.wait_all(0.2) == [None] * 11
    cluster.channels[LEAF].propose(RowsWanted(0, 7))
    headers = cluster.wait_all()
    assert all(h is not None and h.grant(LEAF) == Grant(prefill_rows=7) for h in headers)


def test_the_leader_knows_which_rank_is_missing(cluster: Cluster) -> None:
    propose(cluster, 0, 1, 2, 3, 5, 6)
    leader, parent = cluster.channels[0], cluster.channels[ITS_PARENT]
    futures = [cluster.pool.submit(c.wait, LIMIT_S) for c in cluster.channels if c is not leader]
    future = cluster.pool.submit(leader.wait, LIMIT_S)
    for connections in (cluster.all_connections[0], cluster.all_connections[ITS_PARENT]):
        loop = connections.loop
        wait_until(lambda loop=loop: loop.awaited == ("attention-4",), "the wait")  # type: ignore[misc]
    assert leader.is_wanted
    assert [cluster.channels[r].depth for r in (0, ITS_PARENT, LEAF)] == [0, 1, 2]
    assert parent.missing_workers() == leader.missing_workers() == ["attention-4"]
    assert cluster.channels[6].missing_workers() == ["attention-3"]
    assert cluster.channels[3].missing_workers() == ["attention-0"]
    assert cluster.channels[EXPERT_OF_PARENT].missing_workers() == ["attention-1"]
    cluster.all_connections[LEAF].wake()
    assert futures[LEAF - 1].result(2 * LIMIT_S) is None
    propose(cluster, LEAF)
    assert cluster.channels[LEAF].wait(LIMIT_S) == future.result(2 * LIMIT_S) is not None


def test_a_header_has_arrived_when_all_below_say_so(cluster: Cluster) -> None:
    leader, parent = cluster.channels[0], cluster.channels[ITS_PARENT]
    for channel in cluster.channels[:7]:
        channel.propose(RowsWanted())

    def is_known() -> bool:
        assert cluster.wait_all(0.05) == [None] * 11
        return not leader.missing_workers()

    wait_until(is_known, "all proposals")
    leader.propose(RowsWanted(), even_empty=True)
    assert None not in cluster.wait_all()
    assert not leader.is_settled
    assert parent.awaits_settling
    assert not cluster.channels[LEAF].awaits_settling

    def is_settled() -> bool:
        for channel in cluster.channels[:7]:
            channel.propose(RowsWanted())
        assert cluster.wait_all(0.05) == [None] * 11
        return leader.is_settled

    wait_until(is_settled, "the reports")
    assert not any(channel.awaits_settling for channel in cluster.channels)


@pytest.mark.parametrize(
    ("sender", "receiver", "data", "kind", "reason"),
    [
        (LEAF, 0, PROPOSALS.encode(make_proposal(4)), FrameKind.PROPOSAL, r"ranks \[4\] from"),
        (LEAF, 2, PROPOSALS.encode(NOTHING), FrameKind.PROPOSAL, r"ranks \[\] from"),
        (2, 0, PROPOSALS.encode(make_proposal(4)), FrameKind.PROPOSAL, r"ranks \[4\] from"),
        (
            2,
            LEAF,
            HEADERS.encode(
                StepHeader(
                    generation=1,
                    step=1,
                    epoch=1,
                    oldest_epoch=1,
                    grants=Grants.of(dict.fromkeys(range(7), Grant())),
                )
            ),
            FrameKind.HEADER,
            "from attention-2: must be from attention-1",
        ),
    ],
)
def test_a_message_beside_the_tree_closes_the_edge(
    cluster: Cluster, sender: int, receiver: int, data: bytes, kind: FrameKind, reason: str
) -> None:
    send(cluster.all_connections[sender], f"attention-{receiver}", kind, data)
    with pytest.raises(PeerLostError, match=reason):
        cluster.channels[receiver].wait(LIMIT_S)


def test_a_generation_without_an_inner_rank_has_another_tree(cluster: Cluster) -> None:
    step(cluster)
    kept = [c for i, c in enumerate(cluster.all_connections) if i != ITS_PARENT]
    cluster.start(2, kept, first_step=9)
    rest = [c for i, c in enumerate(cluster.channels) if i != ITS_PARENT]
    propose(cluster, *(r for r in reversed(range(7)) if r != ITS_PARENT))
    futures = [cluster.pool.submit(channel.wait, LIMIT_S) for channel in rest]
    headers = [future.result(2 * LIMIT_S) for future in futures]
    assert headers[0] is not None
    assert (headers[0].step, headers.count(headers[0])) == (9, 10)
