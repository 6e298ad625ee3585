"""Drafts on a pretended GPU: tokens as on a CPU, and steps that are graphs and wait once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.checkpoints.random_checkpoint import TINY, write
from benchmarks.harness.local_engine import LocalEngine
from cluster.config.speculation import SpeculationSection
from tests.harness.pretend_gpu import DEVICE, DeviceLog, pretend_gpu
from tests.reference.goldens import golden_path
from workers.engine import engine as engines
from workers.model.loading.checkpoint import Checkpoint
from workers.requests.request import Request, SamplingParams
from workers.speculation.acceptance import Acceptance

NGRAM = SpeculationSection(speculative_method="ngram", num_speculative_tokens=4, ngram_min=1)
MTP = SpeculationSection(speculative_method="mtp")
PARAMS = [
    SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True),
    SamplingParams(max_tokens=8, temperature=0.7, top_k=8, seed=3, ignore_eos=True),
    SamplingParams(max_tokens=8, temperature=0.0, frequency_penalty=0.2, ignore_eos=True),
]
TEXTS = [(5, 6, 7, 8, 9) * 2, (11, 12, 13) * 3, (3,) * 7]


@pytest.fixture(autouse=True)
def _every_guess_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Acceptance, "num_worthwhile", lambda self, price, most: most)


def run(
    engine: LocalEngine, log: DeviceLog | None = None
) -> tuple[list[list[int]], list[DeviceLog]]:
    """Tokens, and the logs of decode steps."""
    for number, (text, params) in enumerate(zip(TEXTS, PARAMS, strict=True)):
        engine.add_request(Request(request_id=str(number), prompt=text, params=params))
    tokens: list[list[int]] = [[] for _ in TEXTS]
    decodes = []
    while engine.engine.has_work:
        has_prompts = engine.engine.rows_wanted().prefill_rows > 0
        if log is not None:
            log.clear()
        for output in engine.step():
            tokens[int(output.request_id)] += output.token_ids
        if log is not None and not has_prompts:
            decodes.append(DeviceLog(log.waits.copy(), log.launches.copy()))
    return tokens, decodes


@pytest.mark.slow
@pytest.mark.parametrize("has_graphs", [True, False])
def test_rows_of_drafts_are_decodes(monkeypatch: pytest.MonkeyPatch, has_graphs: bool) -> None:
    path = golden_path("olmoe-norm-gqa-clip", "olmoe")
    expected, _ = run(LocalEngine(path, dtype="float32", kernels="torch"))
    if not has_graphs:
        monkeypatch.setattr(engines, "buckets_up_to", lambda most: ())
    with pretend_gpu() as log:
        engine = LocalEngine(path, dtype="float32", device=DEVICE, speculation=NGRAM)
        tokens, decodes = run(engine, log)
    assert tokens == expected
    assert engine.engine.stats()["spec_decode_num_accepted_tokens_total"] > 0
    assert {step.launches["graph"] for step in decodes} == {int(has_graphs)}
    assert {sum(step.waits.values()) for step in decodes} == {1}


@pytest.mark.slow
def test_predictions_cost_a_second_wait(tmp_path: Path) -> None:
    path = write(replace(TINY, family="glm4_moe", prediction_layers=1), tmp_path / "model")
    expected, _ = run(LocalEngine(path, dtype="float32", kernels="torch"))
    with pretend_gpu() as log:
        checkpoint = Checkpoint(path, has_predictor=True)
        engine = LocalEngine(checkpoint, dtype="float32", device=DEVICE, speculation=MTP)
        tokens, decodes = run(engine, log)
    assert tokens == expected
    assert engine.engine.stats()["spec_decode_num_draft_tokens_total"] > 0
    assert {step.launches["graph"] for step in decodes} == {0}
    assert {sum(step.waits.values()) for step in decodes} <= {1, 2}
