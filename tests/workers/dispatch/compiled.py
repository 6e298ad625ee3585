"""Banks of compiled experts for meshes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness.mesh import make_attention_bank, make_bank
from cluster.core.placement import FREE_SLOT
from tests.workers.native.builds import NAMES, library
from workers.experts.bank import ExpertBank, make_kernel
from workers.experts.kernels_native import NativeExperts
from workers.model.config import BankSpec, ExchangeSpec
from workers.native.thread_team import ThreadTeam

CPU = torch.device("cpu")
_GATED = ExchangeSpec(index=0, name="mlp", in_width=40, out_width=40, expert_width=24)
_LINEAR = tuple(replace(e, expert_kind="linear") for e in make_attention_bank().exchanges)
BANKS = (
    replace(make_bank(0, top_k=3), exchanges=(_GATED,)),
    replace(make_attention_bank(1), exchanges=_LINEAR),
)


def weight(spec: BankSpec, expert: int, exchange: int, matrix: int) -> Tensor:
    """float32 [out, in], the same on every worker."""
    shape = spec.exchanges[exchange].matrix_shapes[matrix]
    seed = ((spec.index * 100 + expert) * 10 + exchange) * 10 + matrix
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.div(shape[1] ** 0.5)


def compiled(spec: BankSpec, experts: Sequence[int], dtype: torch.dtype) -> ExpertBank:
    """A bank with these experts in its slots, and threads of its own."""
    own = ThreadTeam(library(NAMES[0]), 2)
    bank = ExpertBank(spec, len(experts), dtype, CPU, partial(make_kernel, team=own))
    for slot, expert in enumerate(experts):
        if expert != FREE_SLOT:
            for exchange, matrix, _ in spec.matrices:
                bank.store(slot, exchange, matrix, weight(spec, expert, exchange, matrix).to(dtype))
    assert all(isinstance(kernel, NativeExperts) for kernel in bank._kernels)
    return bank
