"""The leader's rule: one or two micro-batches."""

from __future__ import annotations

import pytest

from cluster.config.cluster import EngineSection, NumMicroBatches
from cluster.config.workers import Device, WorkersSection
from workers.engine.micro_batches import MicroBatchRule

DISAGGREGATED = WorkersSection()
LOCAL = WorkersSection(mode="local")
COLOCATED = WorkersSection(mode="colocated")


def rule(setting: NumMicroBatches, workers: WorkersSection = DISAGGREGATED) -> MicroBatchRule:
    engine = EngineSection(
        num_micro_batches=setting,
        micro_batch_decode_threshold=8,
        micro_batch_prefill_threshold=16,
    )
    return MicroBatchRule.of(engine, workers)


def test_a_number_holds_for_every_step_that_can_be_split() -> None:
    assert [rule(1).choose(n, True) for n in (1, 2, 500)] == [1, 1, 1]
    assert [rule(2).choose(n, False) for n in (1, 2, 500)] == [1, 2, 2]


def test_auto_looks_at_the_busiest_rank_and_the_kind_of_step() -> None:
    auto = rule("auto")
    assert [auto.choose(n, False) for n in (1, 7, 8)] == [1, 1, 2]
    assert [auto.choose(n, True) for n in (8, 15, 16)] == [1, 1, 2]


def test_auto_does_not_split_where_nothing_can_overlap() -> None:
    assert rule("auto", LOCAL).choose(500, True) == 1
    assert rule("auto", COLOCATED).choose(500, True) == 1
    assert rule(2, LOCAL).choose(500, True) == 2


@pytest.mark.parametrize(
    ("device", "cpus", "expected"), [("cpu", 0.66, 1), ("cpu", 1.0, 2), ("cuda", 0.5, 2)]
)
def test_auto_does_not_split_for_workers_that_share_a_core(
    device: Device, cpus: float, expected: int
) -> None:
    workers = WorkersSection(device=device, cpus_per_worker=cpus)
    assert rule("auto", workers).choose(500, True) == expected


@pytest.mark.parametrize("max_rows", [0, 1])
def test_single_rows_are_never_split(max_rows: int) -> None:
    assert rule(2).choose(max_rows, False) == 1
