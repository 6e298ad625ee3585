"""Quantized weights keep the bundled model's perplexity, and it is measured as it says."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from benchmarks.checkpoints.float_forms import float8_blocks, mxfp4_numbers
from benchmarks.engine import perplexity
from benchmarks.engine.perplexity import (
    AS_STORED,
    FORMS,
    Form,
    Scores,
    bundled,
    checkpoint_of,
    own_task,
    scores,
)
from cluster.launch.model_source import bundled_checkpoint
from tests.harness.tiers import quick_rows
from workers.model.loading.checkpoint import Checkpoint

pytestmark = pytest.mark.heavy

NUM_WINDOWS = 4


@pytest.fixture(scope="module")
def as_stored() -> Scores:
    return scores(AS_STORED, bundled(NUM_WINDOWS))


@pytest.mark.parametrize(
    "form", quick_rows((FORMS[1], FORMS[2], *FORMS[4:]), FORMS), ids=lambda form: form.label
)
def test_quantized_weights_keep_the_perplexity(as_stored: Scores, form: Form) -> None:
    change = scores(form, bundled(NUM_WINDOWS)).change_from(as_stored)
    assert change != 0.0
    assert change <= (0.02 if form.most is None else form.most)


def test_float8_is_served_as_the_checkpoint_stores_it() -> None:
    (form,) = [form for form in FORMS if form.settings is not None]
    with checkpoint_of(form, bundled_checkpoint()) as path:
        banks = Checkpoint(path, quantize="auto").family.banks
        assert {str(e.form) for bank in banks for e in bank.exchanges} == {"e4m3 in groups of 128"}


def test_change_and_error_are_those_of_the_mean() -> None:
    base, other = Scores([-1.0, -2.0, -3.0]), Scores([-1.1, -2.0, -3.2])
    assert base.perplexity == pytest.approx(math.exp(2))
    assert other.change_from(base) == pytest.approx(math.exp(0.1) - 1)
    assert other.error_from(base) == pytest.approx(0.1 / math.sqrt(3))


def test_own_text_is_cut_into_windows(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("To be, or not to be: that is the question.", encoding="utf-8")
    task = own_task(bundled_checkpoint(), text, num_tokens=9, window=4)
    assert [len(window) for window in task.windows] == [4, 4, 1]
    assert (task.dtype, task.num_scored) == ("float32", 6)
    whole = own_task(bundled_checkpoint(), text, num_tokens=9, window=9)
    assert [i for window in task.windows for i in window] == list(whole.windows[0])
    assert len(scores(AS_STORED, task).tokens) == 6


@pytest.mark.slow
def test_every_form_has_a_row() -> None:
    text = perplexity.section(quick=True)
    assert text.startswith("## Perplexity of quantized weights")
    cells = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|")]
    assert cells[2:] == [form.label for form in (AS_STORED, *FORMS)]


def test_numbers_of_float8_are_near_and_edges_have_scales_of_their_own() -> None:
    weight = torch.randn(40, 150, generator=torch.Generator().manual_seed(1))
    codes, scales = float8_blocks(weight, (32, 128))
    assert (codes.shape, scales.shape) == ((40, 150), (2, 2))
    by_number = torch.kron(scales, torch.ones(32, 128))[:40, :150]
    assert scales[1, 1] == weight[32:, 128:].abs().max() / 448
    assert torch.allclose(codes.float() * by_number, weight, rtol=1 / 16, atol=1e-4)


def test_numbers_of_mxfp4_are_the_nearest() -> None:
    """The scale is 2: the largest number, 13, is between 8 and 16, and becomes 6 x 2."""
    weight = torch.zeros(1, 64)
    weight[0, :6] = torch.tensor([13.0, -7.4, 0.4, 2.4, -0.6, 5.2])
    weight[0, 32] = 0.01
    found = mxfp4_numbers(weight)[0]
    assert found[:6].tolist() == [12.0, -8.0, 0.0, 2.0, -1.0, 6.0]
    assert float(found[32]) == pytest.approx(0.01, rel=0.25)
    assert found[6:32].eq(0).all()
