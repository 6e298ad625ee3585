"""Time of a step with given rows on each attention worker, decode rows and prompt rows. Pure.

``cluster.sizing.roofline`` has the formulas of decode steps with equal rows on all workers. Here

- each exchange waits for the attention worker with the most work, and for the busiest expert
  worker. Its work is the mean of random choices of experts by their shares, since with few rows it
  is far above the mean work of the workers,
- a row of a prompt costs operations. Those of attention over earlier tokens are left out,
- a step with prompt rows is no CUDA graph. The host launches its kernels while the device computes,
  so that the longer of both counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from cluster.sizing.roofline import (
    ATTENTION_KERNELS,
    EXPERT_KERNELS,
    BankSize,
    DeviceSpec,
    ModelSize,
    StepTime,
    exchange_s,
    message_s,
)

_NUM_SAMPLES = 64
"""Number of random choices of experts; the mean of the busiest worker's work is used."""
_EXACT_ROWS = 64
"""Numbers of rows up to this are computed as they are, larger ones in steps of about 3%."""


class RankRows(NamedTuple):
    """Work of one attention worker in a step."""

    num_rows: int
    """Rows of decodes and prompts."""
    num_drawn: int
    """Sequences that get a token, which the host samples."""
    context_tokens: int
    """Tokens in the KV cache that the rows read, over all sequences."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolSizes:
    """Numbers of workers of a cluster."""

    num_attention: int
    """Attention workers, or colocated workers."""
    num_experts: int
    """Workers that hold experts, an equal part of each bank; the attention workers themselves if
    they are colocated."""
    is_colocated: bool = False

    @property
    def text(self) -> str:
        """Text such as ``1 attention + 2 expert workers``."""
        if self.is_colocated:
            return f"{self.num_attention} colocated workers"
        return f"{self.num_attention} attention + {self.num_experts} expert workers"


class StepTimes:
    """Computes the times of steps of a model on equal workers."""

    def __init__(
        self,
        model: ModelSize,
        pools: PoolSizes,
        device: DeviceSpec,
        *,
        balancedness: float = 1.0,
        seed: int = 0,
    ) -> None:
        """``balancedness`` divides the time of experts, beside the randomness of choices.

        Experts are placed as in a new cluster: neighbours on one worker. ``seed``: of the choices.
        """
        self._models = {False: model, True: replace(model, is_captured=False)}
        self._pools = pools
        self._device = device
        self._balancedness = balancedness
        self._banks = Counter(model.banks)
        self._draw = np.random.default_rng(seed)
        self._known: dict[int, float] = {}

    def step(
        self, ranks: Sequence[RankRows], *, has_prefill: bool, num_micro_batches: int = 1
    ) -> StepTime:
        """Return the time of a step. ``ranks``: work of each attention worker that has rows.

        The micro-batches have equal parts of the rows.
        """
        pools, device, m = self._pools, self._device, num_micro_batches
        model = self._models[has_prefill]
        is_eager = not model.is_captured
        rows = sum(rank.num_rows for rank in ranks) / m
        host_s = device.host.attention_s(max(rank.num_drawn for rank in ranks))
        attention_s = max(self.attention_s(rank, model, m) for rank in ranks)
        experts_s = self.experts_s(rows)
        starts_s = model.num_exchanges * EXPERT_KERNELS * model.start_s(device)
        experts_s = max(experts_s, starts_s) if is_eager else experts_s + starts_s
        if pools.is_colocated:
            peers = (pools.num_attention - 1,) * 2
            away = peers[0] / pools.num_attention
            sent = rows / pools.num_attention
            host_s += bool(peers[0]) * device.host.expert_s
        else:
            peers, away = (pools.num_experts, pools.num_attention), 1.0
            sent = rows / min(pools.num_attention, pools.num_experts)
            host_s = max(host_s, device.host.expert_s)
        attention_s += message_s(model, peers[0], device)
        experts_s += message_s(model, peers[1], device)
        return StepTime.of(
            pools.text,
            m,
            attention_s=attention_s,
            experts_s=experts_s,
            exchange_s=exchange_s(model, sent, pools.num_experts, away, device),
            host_s=host_s,
            is_colocated=pools.is_colocated,
        )

    def attention_s(self, rank: RankRows, model: ModelSize, m: int = 1) -> float:
        """Return the seconds of everything but experts on one worker, for one of ``m`` batches."""
        device = self._device
        kv_bytes = rank.context_tokens * model.kv_bytes_per_token
        state_bytes = 2 * rank.num_drawn * model.state_bytes
        weight_bytes = model.attention_values * model.itemsize
        read_s = device.read_s(weight_bytes + (kv_bytes + state_bytes) / m)
        busy_s = max(read_s, device.compute_s(2.0 * rank.num_rows / m * model.attention_values))
        starts_s = model.num_exchanges * ATTENTION_KERNELS * model.start_s(device)
        return busy_s + starts_s if model.is_captured else max(busy_s, starts_s)

    def experts_s(self, rows: float) -> float:
        """Return the seconds of all banks on the busiest worker, for the rows of all ranks."""
        number = _rounded(rows)
        if number not in self._known:
            each = (count * self._bank_s(bank, number) for bank, count in self._banks.items())
            self._known[number] = sum(each) / self._balancedness
        return self._known[number]

    def _bank_s(self, bank: BankSize, rows: int) -> float:
        """Return the mean seconds of a bank on the busiest worker."""
        shares = np.asarray(bank.probabilities)
        chosen = self._draw.binomial(rows, shares, (_NUM_SAMPLES, len(shares)))
        first = np.linspace(0, len(shares), self._pools.num_experts, endpoint=False).astype(int)
        active = np.add.reduceat(chosen > 0, first, axis=1, dtype=int)
        pairs = np.add.reduceat(chosen, first, axis=1)
        each_s = self._device.read_s(bank.memory_bytes(self._models[True].itemsize))
        pair_s = self._device.compute_s(2.0 * bank.expert_values)
        return float(np.maximum(active * each_s, pairs * pair_s).max(1).mean())


def _rounded(rows: float) -> int:
    """Return a near number of rows, of few different ones above ``_EXACT_ROWS``."""
    whole = max(1, round(rows))
    unit = 1 << max(0, whole.bit_length() - _EXACT_ROWS.bit_length() + 1)
    return -(-whole // unit) * unit if whole > _EXACT_ROWS else whole
