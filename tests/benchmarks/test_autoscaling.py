"""The autoscaling policy on traces, in simulated time: as good as promised."""

from __future__ import annotations

from benchmarks.simulated.autoscaling import CASES, compare, section
from benchmarks.simulated.cluster_model import ClusterModel, WorkerModel
from benchmarks.simulated.request_trace import Arrival, azure_arrivals, mooncake_arrivals
from cluster.core.topology import Role

WORKER = WorkerModel(prompt_tokens_s=1000, kv_tokens=1000, expert_prompt_tokens_s=1000)


def test_all_requests_of_the_traces_are_there() -> None:
    assert (len(azure_arrivals()), len(mooncake_arrivals())) == (19366, 12031)


def test_a_request_waits_for_room_in_the_model() -> None:
    arrivals = [Arrival(0.0, 600, 60), Arrival(0.5, 600, 60), Arrival(9.0, 1, 1)]
    run = ClusterModel(WORKER, {"attention": 1, "expert": 1}).replay(arrivals, lambda samples: None)
    assert run.waits_s == [0, 3, 0]  # a second for the prompt, two for the tokens


def test_new_workers_are_paid_before_they_serve() -> None:
    arrivals = [Arrival(0.0, 1, 1), Arrival(99.0, 1, 1)]
    wanted: dict[Role, int] = {"attention": 1, "expert": 3}
    run = ClusterModel(WORKER, {"attention": 1, "expert": 1}).replay(arrivals, lambda s: wanted)
    assert run.paid["expert"] == [3] * 100
    sizes = [sample.num_workers for sample in run.samples["expert"]]
    assert sizes == [1] * WORKER.start_s + [3] * (100 - WORKER.start_s)
    assert run.num_changes == 1


def test_the_report_compares_all_policies() -> None:
    text = section(quick=True)
    assert text.startswith("## Autoscaling, simulated")
    for case in CASES:
        assert text.count(f"| {case.name}, ") == 4


def test_a_valley_is_followed_with_few_changes_and_short_waits() -> None:
    case = next(c for c in CASES if c.name == "Azure with a valley")
    found = compare(case)
    policy, peak = found["expertmesh"], found["fixed at the peak"]
    high, low = found["threshold 80%, 50%"], found["threshold 60%, 30%"]
    assert policy.changes <= min(high.changes, low.changes) / 3
    assert policy.wasted < peak.wasted / 2.5
    assert policy.delayed < 0.01 < low.delayed < high.delayed
    assert policy.worst_s <= 3
