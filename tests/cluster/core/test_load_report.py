"""Reports of expert load on the wire."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from cluster.core.codec import Codec
from cluster.core.errors import ProtocolError
from cluster.core.load_report import BankCounts, LoadReport, sum_by_copy
from tests.cluster.controller.load_reports import make_report

CODEC: Codec[LoadReport] = Codec(LoadReport, "a load report")


def same(one: LoadReport, other: LoadReport) -> bool:
    """Arrays have no equality of their own."""
    return CODEC.encode(one) == CODEC.encode(other) and list(one.banks) == list(other.banks)


@pytest.mark.parametrize("largest", [0, 255, 256, 65_536, 2**32, 2**62])
def test_a_report_survives_the_wire(largest: int) -> None:
    sent = make_report(7, [1, 2, largest], [[3, 0], [0, 4], [5, 6]], epoch=3)
    found = CODEC.decode(CODEC.encode(sent))
    assert (found.epoch, found.rows) == (3, 7)
    counts = found.banks["mlp", 0]
    assert (counts.prefill + counts.decode).tolist() == [4, 6, 11 + largest]
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
    assert len(CODEC.encode(report)) < 300_000


def _counts(**changes: Any) -> dict[str, Any]:
    flat, table = [[2], "u1", b"ab"], [[2, 1], "u1", b"ab"]
    good = {"prefill": flat, "decode": flat, "epoch_prefill": table, "epoch_decode": flat}
    return good | changes


def _report(**changes: Any) -> bytes:
    banks = {("mlp", 0): _counts(**changes)}
    return msgspec.msgpack.encode({"epoch": 1, "rows": 1, "banks": banks})


def test_the_good_form_of_what_follows_is_taken() -> None:
    assert CODEC.decode(_report()).banks["mlp", 0].prefill.tolist() == [97, 98]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        msgspec.msgpack.encode({}),
        msgspec.msgpack.encode({"epoch": 1, "rows": 1, "banks": 7}),
        msgspec.msgpack.encode({"epoch": 1, "rows": 1, "banks": {}, "more": 1}),
        msgspec.msgpack.encode({"epoch": 1, "rows": 1, "banks": {"mlp": _counts()}}),
        _report(more=1),
        _report(prefill=None),
        _report(prefill=[[2], "u1"]),
        _report(prefill=[[2], "f4", b"12345678"]),
        _report(prefill=[[2], "u1", b"abc"]),
        _report(prefill=[[2], "u1", "ab"]),
        _report(prefill=[[-1], "u1", b"ab"]),
        _report(prefill=[[-1, -1], "u1", b"a"]),
        _report(prefill=[[10**9], "u1", b"ab"]),
        _report(prefill=[[10**9, 0], "u1", b""]),
        _report(prefill=[[1], "u1", b"a"]),
        _report(prefill=[[1 << 23], "u1", bytes(1 << 23)]),
        _report(prefill=[[], "u1", b"a"]),
        _report(epoch_prefill=[[2], "u1", b"ab"]),
        _report(epoch_prefill=[[2, 0], "u1", b""]),
        _report(decode=[[2], "u8", b"\xff" * 16]),
    ],
)
def test_nonsense_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="not a load report"):
        CODEC.decode(data)


def test_copies_are_added_whatever_their_number() -> None:
    one, other = np.array([[1], [2]]), np.array([[1, 5], [0, 7]])
    assert sum_by_copy(one, other).tolist() == [[2, 5], [2, 7]]
    assert sum_by_copy(other, -one).tolist() == [[0, 5], [-2, 7]]


def test_a_bank_has_an_expert_and_each_expert_a_copy() -> None:
    assert BankCounts.zeros(1, 1).num_experts == 1
    for experts, copies in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="counts of shapes"):
            BankCounts.zeros(experts, copies)
