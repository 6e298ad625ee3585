"""A gateway is killed: the engines end its requests, and the other gateway's streams go on."""

from __future__ import annotations

import random

import pytest

from benchmarks.harness.serving_cluster import ThreadCluster, serving
from tests.harness.fault_rows import FORMS, Form, play, quiet_config
from tests.harness.other_gateway import other_gateway


@pytest.mark.parametrize("form", FORMS)
def test_killing_a_gateway_ends_its_requests_and_no_others(form: Form) -> None:
    """Its clients never stop asking: that no KV block is held afterwards is the engines' doing."""
    with serving(ThreadCluster(quiet_config(2, 1))) as cluster, other_gateway(cluster) as other:
        played = play(cluster, form, random.Random(5), other.kill)
        assert played.num_resubmitted == 0
        assert played.num_retried == 0
        snapshot = cluster.snapshot()
        assert (snapshot["state"], snapshot["generation"]) == ("SERVING", 1)
