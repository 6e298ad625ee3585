"""Load reports of workers that do not exist."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cluster.core.load_report import BankCounts, LoadReport


def make_report(
    rows: int,
    decode: Sequence[int],
    prefill: Sequence[Sequence[int]] | None = None,
    *,
    epoch: int = 1,
    layer: int = 0,
) -> LoadReport:
    """All counts of one bank are of one epoch; ``prefill`` is by expert and copy."""
    copies = np.array(prefill if prefill is not None else [[0]] * len(decode), dtype=np.int64)
    decoded = np.array(decode, dtype=np.int64)
    counts = BankCounts(
        prefill=copies.sum(1), decode=decoded, epoch_prefill=copies, epoch_decode=decoded
    )
    return LoadReport(epoch=epoch, rows=rows, banks={("mlp", layer): counts})


def load_of(rows: int, decode: Sequence[int]) -> LoadReport:
    """Decode rows only."""
    return make_report(rows, decode)
