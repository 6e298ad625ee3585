"""What an attention worker sends to experts beside its rows (``c/exchange.c``).

Reference: ``workers.dispatch.copies.CopyTables.choose`` for rows without a choice of copies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.native.library import Library
from workers.native.panels import DTYPES
from workers.native.team import check


def sent_slots(library: Library, slots: Tensor, ids: Tensor, weights: Tensor | None) -> Tensor:
    """The slots of each row's experts, and behind them the bits of its weights.

    slots [ranks, experts] int32, -1: not on that rank; ids [T, k] int64; weights [T, k] of one of
    ``panels.DTYPES`` -> [ranks, T, 2k] int32, or [ranks, T, k] without weights. Raises
    ``IndexError`` for an id that is no expert's.
    """
    assert slots.dtype == torch.int32
    assert slots.is_contiguous()
    assert ids.dtype == torch.int64
    (num_ranks, num_experts), (num_rows, top_k) = slots.shape, ids.shape
    dtype, ids, address = 0, ids.contiguous(), None
    if weights is not None:
        assert weights.shape == ids.shape
        dtype, weights = DTYPES.index(weights.dtype), weights.contiguous()
        address = weights.data_ptr()
    width = top_k if weights is None else 2 * top_k
    sent = torch.empty(num_ranks, num_rows, width, dtype=torch.int32)
    check(
        library.functions.exchange_slots(
            slots.data_ptr(),
            num_ranks,
            num_experts,
            ids.data_ptr(),
            num_rows,
            top_k,
            address,
            dtype,
            sent.data_ptr(),
        )
    )
    return sent
