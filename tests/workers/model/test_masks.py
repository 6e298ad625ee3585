"""What rows see of their sequence, against plain comparisons: chunks, decodes, windows."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from workers.model.attention_batch import DecodeGroup, PrefillChunk, chunk_mask, decode_mask

CPU = torch.device("cpu")
WINDOWS = st.one_of(st.none(), st.integers(1, 40))


def seen_by(position: int, width: int, window: int | None) -> list[bool]:
    """Which of the first ``width`` positions the row at ``position`` looks at."""
    return [j <= position and (window is None or position - window < j) for j in range(width)]


@given(start=st.integers(0, 30), count=st.integers(1, 12), window=WINDOWS)
def test_chunks_see_what_is_before_them_and_within_the_window(
    start: int, count: int, window: int | None
) -> None:
    length = start + count
    chunk = PrefillChunk(3, 3 + count, length, torch.arange(1), chunk_mask(start, count, CPU))
    if window is not None:
        chunk = chunk.within(window)
    assert chunk.window == window
    rows = range(start, length)
    if chunk.visible is None:
        assert start == 0, "only a whole beginning is plain causal"
        assert window is None or window >= length
    else:
        assert chunk.visible.tolist() == [seen_by(i, length, window) for i in rows]


@given(lengths=st.lists(st.integers(1, 32), min_size=1, max_size=6), window=WINDOWS)
def test_decodes_see_the_keys_of_their_own_length(lengths: list[int], window: int | None) -> None:
    width = 32
    visible = decode_mask(torch.tensor(lengths), width)
    group = DecodeGroup(0, len(lengths), torch.arange(1), visible)
    if window is not None:
        group = group.within(window)
    assert group.lengths.tolist() == lengths
    assert group.window == window
    found = group.visible.tolist()
    assert found == [seen_by(n - 1, width, window) for n in lengths]
