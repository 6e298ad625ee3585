"""Reports of expert load on the wire."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from cluster.errors import ProtocolError
from cluster.load_report import BankCounts, LoadReport, sum_by_copy
from tests.load_reports import make_report


def same(one: LoadReport, other: LoadReport) -> bool:
    """Arrays have no equality of their own."""
    return one.to_dict() == other.to_dict() and list(one.banks) == list(other.banks)


@pytest.mark.parametrize("largest", [0, 255, 256, 65_536, 2**32, 2**62])
def test_a_report_survives_the_wire(largest: int) -> None:
    sent = make_report(7, [1, 2, largest], [[3, 0], [0, 4], [5, 6]], epoch=3)
    found = LoadReport.from_dict(json.loads(json.dumps(sent.to_dict())))
    assert (found.epoch, found.rows) == (3, 7)
    counts = found.banks["mlp", 0]
    assert counts.total.tolist() == [4, 6, 11 + largest]
    assert counts.epoch_prefill.tolist() == [[3, 0], [0, 4], [5, 6]]
    assert counts.epoch_decode.tolist() == [1, 2, largest]
    assert same(sent, found)


def test_a_large_model_is_a_fraction_of_a_control_frame() -> None:
    numbers = np.random.default_rng(0).integers(0, 2**31, size=(128, 2))
    counts = BankCounts(
        prefill=numbers.sum(1),
        decode=numbers.sum(1),
        epoch_prefill=numbers,
        epoch_decode=numbers[:, 0],
    )
    report = LoadReport(epoch=1, rows=1, banks={("mlp", layer): counts for layer in range(62)})
    assert len(json.dumps(report.to_dict())) < 400_000


def _banks(*entry: Any) -> dict[str, Any]:
    return {"epoch": 1, "rows": 1, "banks": [list(entry)]}


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"epoch": 1, "rows": 1, "banks": 7},
        _banks("mlp", 0, 2, 1, "u1"),
        _banks("mlp", 0, 2, 1, "f4", "AAAA"),
        _banks("mlp", 0, 2, 1, "u1", "AAAA"),
        _banks("mlp", 0, 2, 1, "u1", "no base64!"),
        _banks("mlp", 0, 0, 1, "u1", ""),
        _banks("mlp", 0, 10**9, 1, "u1", ""),
        _banks("mlp", 0, 1, 1, "u8", "/////////////////////////////////////////w=="),
    ],
)
def test_nonsense_is_refused(data: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError, match="not a load report"):
        LoadReport.from_dict(data)


def test_copies_are_added_whatever_their_number() -> None:
    one, other = np.array([[1], [2]]), np.array([[1, 5], [0, 7]])
    assert sum_by_copy(one, other).tolist() == [[2, 5], [2, 7]]
    assert sum_by_copy(other, -one).tolist() == [[0, 5], [-2, 7]]
