"""Beams are computed with the adapter of their request."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec import structs

from benchmarks.checkpoints.adapters import put, random_adapter, target_shapes
from benchmarks.harness.local_engine import LocalEngine
from workers.requests.request import BeamParams, Request, SamplingParams

SEARCH = SamplingParams(
    max_tokens=8, temperature=0.0, ignore_eos=True, logprobs=1, beams=BeamParams()
)


def test_beams_are_scored_with_the_adapter(tiny_checkpoint: Path, tmp_path: Path) -> None:
    local = LocalEngine(tiny_checkpoint)
    folder = random_adapter(target_shapes(tiny_checkpoint), 1).write(tmp_path / "a")
    put(local.engine.adapters, "a@1", local.engine.adapters.read(folder))
    plain = Request(request_id="plain", prompt=tuple(range(3, 33)), params=SEARCH, n=3)
    adapted = structs.replace(plain, request_id="adapted", adapter="a@1")
    found = local.run([plain, adapted])
    beams = {key: outputs[0] for key, outputs in found.items()}
    assert {beams["plain", c].token_ids for c in range(3)} != {
        beams["adapted", c].token_ids for c in range(3)
    }
    for choice in range(3):
        beam = beams["adapted", choice]
        scored = structs.replace(
            adapted,
            request_id=f"scored{choice}",
            prompt=adapted.prompt + beam.token_ids,
            params=SamplingParams(max_tokens=1, prompt_logprobs=1, temperature=0.0),
            n=1,
        )
        (first, *_) = local.run([scored])[scored.request_id, 0]
        assert first.prompt_logprobs is not None
        entries = [
            entry for entry in first.prompt_logprobs.entries()[len(adapted.prompt) :] if entry
        ]
        assert [e.token_id for e in entries] == list(beam.token_ids)
        want = [entry.logprob for entry in entries]
        assert [entry.logprob for entry in beam.logprobs] == pytest.approx(want, abs=1e-4)


def test_a_search_fails_whose_adapter_is_unloaded(tiny_checkpoint: Path, tmp_path: Path) -> None:
    local = LocalEngine(tiny_checkpoint)
    folder = random_adapter(target_shapes(tiny_checkpoint), 1).write(tmp_path / "a")
    put(local.engine.adapters, "a@1", local.engine.adapters.read(folder))
    local.add_request(Request(request_id="r", prompt=(3, 4), params=SEARCH, n=3, adapter="a@1"))
    for _ in range(3):
        assert not local.step()
    local.engine.requests.drop_adapter("a@1")
    outputs = local.engine.poll()
    assert [(o.choice, o.error_code) for o in outputs] == [(c, "model_not_found") for c in range(3)]
    assert not local.engine.has_work
    assert not local.engine.requests.adapters_in_use
    local.engine.check_integrity()
