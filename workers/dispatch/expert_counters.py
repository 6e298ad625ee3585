"""Counters of the rows, bytes and times of one expert rank, for metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from workers.metrics.padding import PaddingRatio
from workers.model.config import ExchangeSpec


class ReceivedRows(NamedTuple):
    """Rows of one exchange that an expert rank received."""

    exchange: ExchangeSpec
    num_inputs: int
    num_rows: int
    by_pair: bool
    """Whether the rank returns one output for each (row, expert) pair instead of one sum for each
    row."""


class UsedRows(NamedTuple):
    """The part of received rows that an expert rank used."""

    num_rows_here: int
    """Number of rows that have an expert on this rank."""
    num_pairs: int


class ExpertCounters:
    """Counts rows that one expert rank received, computed and returned. Any thread may read."""

    def __init__(self) -> None:
        self.num_bytes = {"dispatch": 0, "combine": 0}
        """Total bytes of received rows (``dispatch``) and of sent outputs (``combine``)."""
        self.slot_seconds = 0.0
        """Total seconds in which expert outputs were computed; meaningless on a GPU, whose kernels
        run asynchronously."""
        self.padding = PaddingRatio()
        """Share of padding in the rows from and to the attention ranks, measured in a sample of the
        steps, on a GPU in every step."""
        self.all_token_counts = torch.zeros(0, dtype=torch.int64)
        """``token_counts`` of all banks, one after another."""
        self.token_counts: Sequence[Tensor] = ()
        """Number of (row, expert) pairs that each expert slot has computed: for each bank, [slots]
        int64 on the CPU, views of ``all_token_counts``."""

    def resize(self, num_slots: Sequence[int]) -> None:
        """Add slot counters until each bank has the number in ``num_slots``.

        Existing counters keep their values.
        """
        old = {bank: len(counts) for bank, counts in enumerate(self.token_counts)}
        sizes = [max(wanted, old.get(bank, 0)) for bank, wanted in enumerate(num_slots)]
        if sizes == list(old.values()):
            return
        self.all_token_counts = torch.zeros(sum(sizes), dtype=torch.int64)
        resized = torch.split(self.all_token_counts, sizes)
        for bank, counts in enumerate(self.token_counts):
            resized[bank][: len(counts)] = counts
        self.token_counts = resized

    def add_padding(self, received: ReceivedRows, used: UsedRows) -> None:
        """Count the padding of one exchange: transferred rows that were not used."""
        num_used = used.num_pairs if received.exchange.per_slot_input else used.num_rows_here
        self.padding.add("dispatch", received.num_inputs, num_used)
        if received.by_pair:  # outputs by pair have no padding
            self.padding.add("combine", used.num_pairs, used.num_pairs)
        else:
            self.padding.add("combine", received.num_rows, used.num_rows_here)

    def stats(self, *, has_slot_seconds: bool) -> dict[str, float]:
        """Return the counters by metric name without prefix.

        ``expert_worker_tokens_total`` counts (row, expert) pairs. ``has_slot_seconds``: whether
        ``slot_seconds`` was measured and is included.
        """
        num_tokens = sum(int(counts.sum()) for counts in self.token_counts)
        slot_seconds = {"expert_worker_slot_seconds_total": self.slot_seconds}
        return {
            "expert_worker_tokens_total": float(num_tokens),
            **{
                f'dispatch_bytes_total{{direction="{direction}"}}': float(count)
                for direction, count in self.num_bytes.items()
            },
            **(slot_seconds if has_slot_seconds else {}),
            **self.padding.stats(),
        }
