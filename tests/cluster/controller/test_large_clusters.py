"""What the controller of a large cluster sends and computes: counted, not timed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from benchmarks.harness.large_cluster import NUM_REPORTS, LargeCluster
from benchmarks.harness.members import members_of
from cluster.cli.cluster.info import _status_text
from cluster.controller.cluster import Cluster
from cluster.controller.controller_memory import memory_keepers
from cluster.controller.documents import SharedDocuments, load_document
from cluster.controller.effects import SendFrame
from cluster.controller.workers import WorkerRecord
from cluster.core.frames import ControlFrame, ControllerSnapshot, StatusRequest
from cluster.core.states import WorkerState
from cluster.core.topology import LARGE_CLUSTER, Member
from cluster.policy.coverage import MAX_LISTED, describe_losses, listed
from tests.cluster.controller.fakes_cluster import FakeCluster


def started(num_members: int) -> LargeCluster:
    large = LargeCluster(num_members, num_layers=2, num_experts=64)
    large.start()
    return large


def test_a_start_sends_one_generation_and_a_state_for_each_pause() -> None:
    """Progress of 20 workers is no more versions of the state than progress of 10."""
    few, many = started(10), started(20)
    for large in (few, many):
        assert large.cluster.state.value == "SERVING"
        assert large.num_encoded["NewGeneration"] == large.num_encoded["RunGeneration"] == 1
        assert large.num_encoded["ControllerSnapshot"] == 2
    ready = 10
    assert few.num_versions <= 2 * NUM_REPORTS + 10 + ready
    assert many.num_versions - few.num_versions == ready


def test_some_workers_keep_the_memory_of_a_large_cluster() -> None:
    """All workers learn the term and the places; later changes are only on 16 hosts."""
    crowd = {f"attention-{rank}": "one" for rank in range(4)}
    names = [member.name for member in members_of({"attention": 12, "expert": 8})]
    cluster = FakeCluster(12, 8, hosts={**{name: name for name in names}, **crowd})
    cluster.serve()
    firsts = {name for name, frames in cluster.link.sent.items() if _memories(frames)}
    assert len(firsts) == 20
    before = {name: len(_memories(frames)) for name, frames in cluster.link.sent.items()}
    cluster.known.send_snapshot()
    after = {name: len(_memories(frames)) for name, frames in cluster.link.sent.items()}
    told = {name for name, number in after.items() if number > before[name]}
    assert len(told) == LARGE_CLUSTER
    assert len(told & crowd.keys()) == 1
    cluster.disconnect(min(told))
    version = cluster.known.sent_version
    kept = [name for name, fs in cluster.link.sent.items() if version in _memories(fs)]
    assert len(kept) == LARGE_CLUSTER, "another worker takes the place of the lost one"


def test_the_memory_survives_the_loss_of_a_rack() -> None:
    """The keepers are in all racks and on hosts of their own; rack 0 has the first names."""
    records = []
    for number in range(64):
        member = Member(
            name=f"expert-{number}",
            role="expert",
            rank=number,
            device=number,
            node=f"host-{number // 2}",
            domain=f"rack-{number // 16}",
        )
        records.append(
            WorkerRecord(member=member, heard_at=0.0, progress_at=0.0, state=WorkerState.READY)
        )
    keepers = {int(name.partition("-")[2]) for name in memory_keepers(records)}
    assert Counter(number // 16 for number in keepers) == dict.fromkeys(range(4), 4)
    assert len({number // 2 for number in keepers}) == LARGE_CLUSTER


def _memories(frames: Sequence[ControlFrame]) -> list[int]:
    """Versions of the memories that a worker has got."""
    return [frame.version for frame in frames if isinstance(frame, ControllerSnapshot)]


def test_the_stages_of_a_start_are_in_the_status() -> None:
    large = LargeCluster(4, num_layers=1, num_experts=8)
    assert large.controller.snapshot()["start"] == []
    large.start()
    stages = large.controller.snapshot()["start"]
    assert [one["name"] for one in stages] == ["placing", "reading", "warming_up", "connecting"]
    assert [one["seconds"] for one in stages] == [0.0, pytest.approx(2.0), 0.0, 0.0]
    assert {one["last_worker"] for one in stages} == {"expert-1"}
    text = _status_text(large.controller.snapshot(), colours=False)
    assert "start       2.0 s: placing 0.0 s (expert-1 last), reading 2.0 s" in text


def test_callers_share_the_stats_of_a_large_cluster() -> None:
    large = started(20)
    large.now = 10.0
    for now in (10.0, 10.5, 10.9):
        large.controller.request_status(now)
        large.carry_out()
    assert large.num_encoded["StatusRequest"] == 1
    large.controller.request_status(11.0)
    (effect,) = large.cluster.take_effects()
    assert isinstance(effect, SendFrame)
    assert isinstance(effect.frame, StatusRequest)
    assert not effect.frame.has_load, "it comes with heartbeats"


def test_callers_share_a_document_until_the_state_changes() -> None:
    large, small = started(20), started(10)
    made: list[Cluster] = []

    def make(cluster: Cluster | None) -> dict[str, Any]:
        assert cluster is not None
        made.append(cluster)
        return load_document(cluster)

    documents = SharedDocuments()
    first = documents.get(make, large.cluster, 10.0)
    assert documents.get(make, large.cluster, 10.9) is first
    assert documents.get(make, large.cluster, 11.0) is not first
    large.cluster.touch()
    documents.get(make, large.cluster, 11.0)
    assert len(made) == 3
    for now in (20.0, 20.1):
        documents.get(make, small.cluster, now)
    assert len(made) == 5, "callers of a small cluster get the newest load"


def test_workers_of_a_large_cluster_join_together() -> None:
    """After a pause of 0.3 s, they wait until the others have run for ten times as long."""
    cluster = FakeCluster(11, 8)
    cluster.serve()
    for name in ("attention-8", "attention-9"):
        cluster.disconnect(name)
    cluster.now += 0.3
    cluster.join_all()
    before = cluster.known.generation
    assert (cluster.known.runs, len(before.members)) == (True, 17)
    cluster.tick(0.1)
    first, second = cluster.started()
    for name in (first, second):
        cluster.bring_up(name)
        assert cluster.known.generation is before
    for _ in range(6):
        cluster.tick(0.4)
        cluster.beat_all()
    assert cluster.known.generation is before
    cluster.tick(1.0)
    assert cluster.known.generation.number == before.number + 1
    assert {first, second} < {member.name for member in cluster.known.generation.members}


def test_a_status_of_a_large_cluster_fits_a_screen() -> None:
    large = started(64)
    status = large.controller.snapshot()
    status["workers"][3]["state"] = "LOADING"
    status["workers"][9] |= {"kv_usage": 0.9, "kv_blocks_total": 100, "kv_blocks_free": 10}
    status["problems"] = [f"expert-{rank} waits for room" for rank in range(32)]
    text = _status_text(status, colours=False)
    assert len(text.splitlines()) < 40
    assert "attention  32       31 SERVING, 1 LOADING  10 of 100 KV blocks free" in text
    rows = [line.split()[0] for line in text.splitlines() if line.startswith("attention-")]
    assert rows == ["attention-3", "attention-9"]
    assert "and 16 more problems" in text
    assert text.endswith("all workers: expertmesh workers")


def test_texts_about_many_workers_are_short() -> None:
    names = [f"expert-{rank}" for rank in range(MAX_LISTED + 3)]
    assert listed(names[:2]) == "expert-0, expert-1"
    assert listed(names).endswith("expert-7 and 3 more")
    assert describe_losses(dict.fromkeys(names, "killed")).endswith("and 3 more")
