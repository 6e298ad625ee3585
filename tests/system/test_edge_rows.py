"""More expert workers than experts of a row: messages have room for the rows that need them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.local_engine import LocalEngine
from benchmarks.harness.serving_cluster import ThreadCluster, make_config, serving
from tests.harness.tiers import quick_values
from workers.dispatch.edge_rows import EdgeRows
from workers.dispatch.row_exchange import StaticExchange
from workers.requests.request import Request, SamplingParams, TokenOutput

NUM_REQUESTS = 64


def make_requests() -> list[Request]:
    params = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    return [
        Request(request_id=f"r{i}", prompt=(1 + i, 2 + i, 90 - i), params=params)
        for i in range(NUM_REQUESTS)
    ]


def tokens(outputs: Sequence[TokenOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch) -> Counter[bool]:
    """Dispatches with fewer rows than granted, and whether a step was complete."""
    found: Counter[bool] = Counter()
    pick, end_step = StaticExchange._split_needed, EdgeRows.end_step

    def spy_pick(self: StaticExchange, *arguments: Any) -> Any:
        found[True] += 1
        return pick(self, *arguments)

    def spy_end(self: EdgeRows) -> bool:
        is_complete = end_step(self)
        found[False] += not is_complete
        return is_complete

    monkeypatch.setattr(StaticExchange, "_split_needed", spy_pick)
    monkeypatch.setattr(EdgeRows, "end_step", spy_end)
    return found


@pytest.mark.parametrize(
    ("transport", "is_guessed_low"), quick_values(["sockets", "collective"], [False, True])
)
def test_answers_are_those_of_one_process(
    tiny_checkpoint: Path,
    limited: Counter[bool],
    monkeypatch: pytest.MonkeyPatch,
    transport: str,
    is_guessed_low: bool,
) -> None:
    """Also where too little room is left, and steps run again."""
    if is_guessed_low:
        share = EdgeRows.share.fget  # type: ignore[attr-defined]
        monkeypatch.setattr(EdgeRows, "share", property(lambda rows: share(rows) // 3))
    expected = LocalEngine(tiny_checkpoint).run(make_requests())
    config = make_config(
        tiny_checkpoint,
        1,
        8,
        dtype="float32",
        workers={"kernels": "torch"},
        engine={"num_micro_batches": 1},
        transport={"transport": transport},
    )
    with serving(ThreadCluster(config)) as cluster:
        answers = cluster.answers(make_requests())
        snapshot = cluster.wait(lambda snapshot: True, fresh=True)
    for name, answer in answers.items():
        assert tokens(answer.outputs) == tokens(expected[name, 0]), name
    assert limited[True] > 10
    assert limited[False] > 0 or not is_guessed_low
    assert len(snapshot["history"]) == 1, "a worker was lost"
