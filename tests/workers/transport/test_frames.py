"""Frame headers: what comes back is what went out, or a named error."""

from __future__ import annotations

import random
from typing import Any

import pytest

from benchmarks.harness.mesh import make_attention_bank, make_bank
from cluster.core.errors import ProtocolError
from workers.transport.frames import (
    EXACT,
    HEADER_BYTES,
    MAX_STEP_FRAME_BYTES,
    PER_SLOT,
    FrameHeader,
    FrameKind,
    max_data_bytes,
)

LIMIT = 10_000


def make_header(**changes: Any) -> FrameHeader:
    header = FrameHeader(
        FrameKind.ROWS,
        generation=3,
        step=1 << 40,
        flags=EXACT | PER_SLOT,
        bank=300,
        exchange=2,
        micro_batch=1,
        counts=(5, 40),
        length=9999,
    )
    return header._replace(**changes)


def test_header_survives_the_wire() -> None:
    header = make_header()
    assert len(header.encode()) == HEADER_BYTES
    assert FrameHeader.decode(header.encode(), LIMIT) == header


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, ord("X"), "magic"),
        (4, 9, "version"),
        (5, 0, "kind 0"),
        (5, 5, "kind 5"),
        (18, 4, "flags"),
        (22, 2, "micro-batch"),
    ],
)
def test_a_wrong_field_is_named(at: int, value: int, message: str) -> None:
    data = bytearray(make_header().encode())
    data[at] = value
    with pytest.raises(ProtocolError, match=message):
        FrameHeader.decode(bytes(data), LIMIT)


def test_lengths_are_bounded_by_kind() -> None:
    with pytest.raises(ProtocolError, match="at most 10000"):
        FrameHeader.decode(make_header(length=LIMIT + 1).encode(), LIMIT)
    step = make_header(kind=FrameKind.HEADER, length=LIMIT + 1)
    assert FrameHeader.decode(step.encode(), LIMIT).length == LIMIT + 1
    with pytest.raises(ProtocolError, match="at most"):
        FrameHeader.decode(step._replace(length=MAX_STEP_FRAME_BYTES + 1).encode(), LIMIT)


def test_random_bytes_never_crash() -> None:
    rng = random.Random(0)
    good = make_header().encode()
    for _ in range(3000):
        data = bytearray(good)
        for _ in range(rng.randint(1, 6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            header = FrameHeader.decode(bytes(data), LIMIT)
        except ProtocolError:
            continue
        assert header.length <= MAX_STEP_FRAME_BYTES


def test_the_largest_frame_holds_both_directions() -> None:
    bank = make_bank(width=100, top_k=4)
    assert max_data_bytes([bank], 10, 2, "sum") == 10 * 400  # float32 sums
    assert max_data_bytes([bank], 10, 2, "per_slot") == 10 * 100 * 4 * 2
    narrow = make_attention_bank()
    assert max_data_bytes([narrow, bank], 10, 2, "sum") == 10 * 400
