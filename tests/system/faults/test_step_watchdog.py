"""No step comes, and nothing else shows why: paths work, workers live and do not stand still."""

from __future__ import annotations

import random

import pytest

from benchmarks.faults.layouts import row_config
from benchmarks.harness.serving_cluster import RayCluster, connected_ray, serving
from tests.harness.fault_rows import FORMS, Form, play, serving_name, whole
from tests.harness.foreign_sockets import deafen

pytestmark = pytest.mark.ray


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_a_leader_that_gets_no_proposal_of_a_rank_goes_on_without_it(form: Form) -> None:
    """The leader's host acknowledges what the other attention worker sends."""
    with connected_ray(), serving(RayCluster(row_config(2, 2))) as cluster:
        leader, other = (serving_name(cluster, "attention", rank) for rank in range(2))
        pids = cluster.worker(leader)["pid"], cluster.worker(other)["pid"]
        played = play(cluster, form, random.Random(1), lambda: deafen(*pids))
        assert played.num_resubmitted > 0
        reason = cluster.worker(other)["reason"]
        assert f"waiting for {other}" in reason, reason
        assert whole(cluster)["experts_complete"]
