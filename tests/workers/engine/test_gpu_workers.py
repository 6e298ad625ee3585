"""Steps with experts on other workers, all on a pretended GPU: graphs, with messages between them
or within."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from msgspec.structs import replace

from benchmarks.harness.local_engine import LocalEngine
from tests.harness.pretend_gpu import DEVICE, DeviceLog, pretend_gpu
from tests.reference.apart import ExpertsApart
from tests.reference.goldens import golden_path
from tests.workers.engine.test_gpu_steps import OLMOE, on_cpu, requests, tokens
from workers.metrics.step_metrics import SAMPLE_INTERVAL
from workers.requests.buckets import bucket_of, buckets_up_to
from workers.requests.request import TokenOutput
from workers.requests.step_header import Grant, Grants, StepHeader

NUM_RANKS = 5
"""More than the experts of a row."""


class Apart:
    """The same requests with experts on other ranks, and the log of each decode step."""

    def __init__(
        self,
        log: DeviceLog,
        *,
        num_ranks: int = 2,
        buckets: Sequence[int] = buckets_up_to(64),
        parts: int = 1,
        limit: int = 0,
        is_captured: bool = False,
        has_static_prompts: bool = False,
        engine: LocalEngine | None = None,
    ) -> None:
        """``limit``: rows on an edge, once it is known how many an expert rank needs.
        ``is_captured``: messages are part of the graphs."""
        self.log = log
        self.buckets = buckets
        self.limit = limit
        self._has_static_prompts = has_static_prompts
        self.engine = engine or LocalEngine(
            golden_path(OLMOE, "olmoe"),
            dtype="float32",
            device=DEVICE,
            num_micro_batches=parts,
        )
        self.apart = ExpertsApart(self.engine, num_ranks, is_captured=is_captured)
        self.decodes: list[DeviceLog] = []
        self.headers: list[StepHeader] = []
        self.epoch = 1
        self._run = self.engine.engine.step
        self.engine.engine.step = self._step  # type: ignore[method-assign]

    def _step(self, header: StepHeader) -> list[TokenOutput]:
        """What the leader makes of the header, and the experts' part."""
        # Step 8, whose times are measured, is one of those that decode.
        header = replace(header, epoch=self.epoch, step=header.step + SAMPLE_INTERVAL - 2)
        has_prompts = header.exact
        if has_prompts:
            header = replace(header, exact=not self._has_static_prompts)
        else:
            bucket = bucket_of(header.rows(0, 0), self.buckets)
            limit = self.limit if self.apart.home.edge_share else 0
            header = replace(header, bucket=bucket, edge_limit=limit)
        self.headers.append(header)
        self.log.clear()
        with self.apart.serving(header):
            outputs = self._run(header)
        if not has_prompts:
            self.decodes.append(DeviceLog(self.log.waits.copy(), self.log.launches.copy()))
        return outputs

    def capture(self, bucket: int) -> list[TokenOutput]:
        """Run a step that has only padding."""
        header = StepHeader(
            generation=1,
            step=SAMPLE_INTERVAL + 1,
            epoch=self.epoch,
            oldest_epoch=1,
            grants=Grants.of({0: Grant()}),
            bucket=bucket,
        )
        with self.apart.serving(header):
            return self._run(header)

    def tokens(self) -> dict[str, list[int]]:
        """Of the requests, which it runs."""
        return tokens(self.engine.run(requests()))


@pytest.fixture
def log() -> Iterator[DeviceLog]:
    with pretend_gpu() as log, torch.no_grad():
        yield log


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 2])
def test_steps_are_graphs_and_each_rank_waits_once(log: DeviceLog, parts: int) -> None:
    run = Apart(log, parts=parts)
    assert run.tokens() == on_cpu(OLMOE)
    num_layers, num_ranks = len(run.engine.banks), 2
    pieces = 2 * num_layers * parts + 1
    for step in run.decodes:
        assert step.launches["graph"] == (1 + num_ranks) * pieces
        assert sum(step.waits.values()) == 1 + num_ranks


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 2])
def test_a_step_is_one_graph_if_the_transport_can_be_captured(log: DeviceLog, parts: int) -> None:
    run = Apart(log, parts=parts, is_captured=True)
    assert run.tokens() == on_cpu(OLMOE)
    num_ranks = 2
    assert {step.launches["graph"] for step in run.decodes} == {1 + num_ranks}
    # The attention rank waits for the step before; the last step also for itself.
    assert [sum(step.waits.values()) - num_ranks for step in run.decodes] == [0, 1, 2]


@pytest.mark.slow
def test_steps_without_a_bucket_are_not_captured(log: DeviceLog) -> None:
    run = Apart(log, buckets=())
    assert run.tokens() == on_cpu(OLMOE)
    assert {step.launches["graph"] for step in run.decodes} == {0}


def captured(run: Apart) -> list[int]:
    """How many steps each rank has captured."""
    graphs = run.engine.engine.runner.graphs
    assert graphs is not None
    return [len(graphs._kept), *(len(server.captured._kept) for server in run.apart.servers)]


@pytest.mark.slow
@pytest.mark.parametrize("is_captured", [False, True])
def test_a_step_of_padding_is_captured_for_later_steps(log: DeviceLog, is_captured: bool) -> None:
    run = Apart(log, is_captured=is_captured)
    for bucket, number in ((4, 1), (2, 2), (4, 2)):
        assert run.capture(bucket) == []
        assert captured(run) == [number] * 3
    assert run.tokens() == on_cpu(OLMOE)
    assert {header.bucket for header in run.headers} == {0, 4}
    assert captured(run) == [2] * 3


@pytest.mark.slow
def test_prompts_of_which_every_rank_gets_all_rows(log: DeviceLog) -> None:
    run = Apart(log, is_captured=True, has_static_prompts=True)
    assert run.tokens() == on_cpu(OLMOE)
    assert {header.exact for header in run.headers} == {False}
    assert any(header.prefill_rows for header in run.headers)


@pytest.mark.slow
def test_a_new_epoch_needs_no_new_graphs(log: DeviceLog) -> None:
    run = Apart(log)
    expected = run.tokens()
    before, graphs = captured(run), run.engine.engine.runner.graphs
    assert graphs is not None
    steps = list(graphs._kept._kept.values())
    run.epoch = 2
    run.apart.place(1, run.epoch)
    assert run.tokens() == expected
    assert captured(run) == before
    assert list(graphs._kept._kept.values()) == steps


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "is_too_narrow", "is_captured"),
    [(1, True, False), (3, False, False), (1, True, True), (3, False, True)],
)
def test_captured_steps_know_when_an_edge_was_too_narrow(
    log: DeviceLog,
    monkeypatch: pytest.MonkeyPatch,
    limit: int,
    is_too_narrow: bool,
    is_captured: bool,
) -> None:
    """If the messages are captured too, the step after it has run in vain."""
    monkeypatch.setattr("workers.dispatch.edge_rows._MIN_ROWS", 1)
    run = Apart(log, num_ranks=NUM_RANKS, buckets=(8,), limit=limit, is_captured=is_captured)
    assert run.tokens() == on_cpu(OLMOE)
    assert {header.edge_limit for header in run.headers} == {0, limit}
    assert {step.launches["graph"] > 0 for step in run.decodes} == {True}
    assert (run.engine.engine.stats()["steps_repeated_total"] > 0) == is_too_narrow
