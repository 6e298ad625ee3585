"""Workers of a prefill group, a decode group and their experts die; each loss is of one worker."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import pytest

from benchmarks.faults.layouts import row_config
from benchmarks.harness.serving_cluster import RayCluster, ThreadCluster, connected_ray, serving
from tests.harness.fault_rows import (
    FORMS,
    SMALL,
    Form,
    entries_since,
    kill,
    play,
    play_until,
    quiet_config,
    was_disturbed,
    whole,
)
from tests.system.faults.test_scaling import scale

GROUPS: dict[str, Any] = {
    "num_attention_workers": None,
    "num_prefill_workers": 1,
    "num_decode_workers": 2,
}
"""``attention-0`` is the prefill group and its leader, ``attention-1`` leads the decode group."""
VICTIMS = ("attention", 0), ("attention", 1), ("attention", 2), ("expert", 1)
OWN_EXPERTS = {**GROUPS, "share_experts": "no"}
"""``expert-0`` belongs to the prefill group, ``expert-1`` and ``expert-2`` to the decode group."""


@pytest.mark.parametrize(
    ("workers", "victim"),
    [
        *(pytest.param(GROUPS, victim, id=f"{victim[0]}-{victim[1]}") for victim in VICTIMS),
        pytest.param(OWN_EXPERTS, ("expert", 0), id="own-expert-0"),
        pytest.param(OWN_EXPERTS, ("expert", 2), id="own-expert-2"),
        pytest.param(OWN_EXPERTS, ("attention", 0), id="own-attention-0"),
    ],
)
def test_a_worker_of_threads(workers: dict[str, Any], victim: tuple[str, int]) -> None:
    config = quiet_config(3, 3, num_redundant=22, workers=workers)
    cluster = ThreadCluster(config)
    with serving(cluster):
        before = cluster.snapshot()
        role, rank = victim

        def stop_one() -> None:
            cluster.group.workers[f"{role}-{rank}"].stop()

        play_until(cluster, SMALL, random.Random(rank), stop_one, was_disturbed)
        after = whole(cluster)
        lost = [e for e in entries_since(before, after) if "lost" in e["cause"]]
        assert len(lost) == 1, [e["cause"] for e in entries_since(before, after)]


def test_roles_change_under_load() -> None:
    """Each change is one generation; no worker starts or ends."""
    cluster = ThreadCluster(quiet_config(3, 2, num_redundant=22, workers=GROUPS))
    with serving(cluster):
        for prefill in (2, 1, 2):
            before = cluster.snapshot()
            change = partial(scale, cluster, prefill=prefill, decode=3 - prefill)
            play(cluster, SMALL, random.Random(prefill), change)
            after = whole(cluster)
            causes = [entry["cause"] for entry in entries_since(before, after)]
            assert causes == ["attention workers change their step groups"]
            found = sorted(w["group"] for w in after["workers"] if w["group"])
            assert found == ["decode"] * (3 - prefill) + ["prefill"] * prefill


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("form", FORMS)
def test_each_process(form: Form) -> None:
    with connected_ray(), serving(RayCluster(row_config(3, 3, workers=GROUPS))) as cluster:
        for role, rank in VICTIMS:
            names = [w["name"] for w in cluster.snapshot()["workers"] if w["state"] == "SERVING"]
            name = sorted(n for n in names if n.startswith(role))[rank]
            play(cluster, form, random.Random(rank), partial(kill, cluster, name))
            whole(cluster)
