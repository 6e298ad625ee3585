"""Losses against torch, in the words of transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from cluster.core.errors import RequestError
from gateway.calls.losses import aux_loss, classification_loss
from workers.requests.inspection import RouterShape

SCORES = torch.tensor([[0.5, -2.0, 3.0], [1.0, 1.0, -40.0], [-7.0, 2.5, 0.0]])


def test_single_label() -> None:
    labels = [2, -100, 0]
    want = functional.cross_entropy(SCORES, torch.tensor(labels)).item()
    rows = [(label,) for label in labels]
    for kind in ("single_label_classification", ""):
        assert classification_loss(SCORES.numpy(), rows, kind) == pytest.approx(want, rel=1e-6)
    assert classification_loss(SCORES.numpy(), [(-100,)] * 3, "") is None


def test_multi_label() -> None:
    rows = [(1.0, 0.0, 1.0), (0.0, 0.0, 1.0), (0.25, 1.0, 1.0)]
    want = functional.binary_cross_entropy_with_logits(SCORES, torch.tensor(rows)).item()
    for kind in ("multi_label_classification", ""):
        assert classification_loss(SCORES.numpy(), rows, kind) == pytest.approx(want, rel=1e-6)


def test_regression() -> None:
    rows = [(1.5,), (-2.0,), (0.0,)]
    one = SCORES[:, :1]
    want = functional.mse_loss(one.squeeze(), torch.tensor(rows).squeeze()).item()
    assert classification_loss(one.numpy(), rows, "") == pytest.approx(want, rel=1e-6)
    three = [(1.0, 2.0, 3.0)] * 3
    want = functional.mse_loss(SCORES, torch.tensor(three)).item()
    assert classification_loss(SCORES.numpy(), three, "regression") == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize(
    ("rows", "kind", "text"),
    [
        ([(3,)] * 3, "single_label_classification", "-100 or 0 to 2"),
        ([(0.5,)] * 3, "single_label_classification", "one class a prompt"),
        ([(0.5,)] * 3, "", "1 values for a prompt, there are 3 classes"),
    ],
)
def test_labels_of_another_shape(rows: list[tuple[float, ...]], kind: str, text: str) -> None:
    with pytest.raises(RequestError, match=text):
        classification_loss(SCORES.numpy(), rows, kind)


def test_balanced_routers_lose_top_k() -> None:
    """E * sum f * p is k where all experts are chosen alike, in both spellings."""
    banks = [
        RouterShape(name="attention:0", num_experts=4, top_k=2, aux_copies=2),
        RouterShape(name="mlp:0", num_experts=4, top_k=2, aux_copies=1),
    ]
    even = np.array([[4.0] * 4, [2.0] * 4], dtype=np.float32)
    found = aux_loss([{"attention:0": even, "mlp:0": even}], [8], banks)
    assert found == {"transformers_4": pytest.approx(2.0), "transformers_5": pytest.approx(2.0)}
    uneven = np.array([[8.0, 8.0, 0, 0], [4.0, 4.0, 0, 0]], dtype=np.float32)
    found = aux_loss([{"attention:0": uneven, "mlp:0": even}], [8], banks)
    assert found["transformers_5"] > found["transformers_4"] > 2.0
