"""Selection of the experts of each row, and computation of their weights, in one kernel.

Reference: ``workers.model.routing.Router``, with the same roundings. If experts have equal scores,
the first one is selected.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import triton.language as tl
from torch import Tensor

from workers.cuda.triton_common import cast, jit, power_of_two

Scoring = Literal["softmax", "softmax_of_best", "sigmoid"]
_LEAST_CHOICE = tl.constexpr(-3.0e38)
"""Lowest score of an expert that can be selected. An expert that was selected gets a lower score,
so that it is not selected twice."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingParams:
    """How a router selects and weights experts: fields of ``workers.model.routing.Routing``."""

    top_k: int
    scoring: Scoring
    is_normed: bool
    least_sum: float
    scale: float


def choose(
    logits: Tensor, choice: RoutingParams, correction: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Choose experts by router logits [T, E]; return ids [T, k] int64, best first, and weights
    [T, k] ``dtype``.

    ``correction`` [E] float32, or None: added to the scores for the selection, not for the weights.
    """
    (num_rows, num_experts), top_k = logits.shape, choice.top_k
    ids = torch.empty(num_rows, top_k, dtype=torch.int64, device=logits.device)
    weights = torch.empty(num_rows, top_k, dtype=dtype, device=logits.device)
    if num_rows:
        _choose[(num_rows,)](
            logits,
            logits if correction is None else correction,
            ids,
            weights,
            logits.stride(0),
            choice.least_sum,
            choice.scale,
            SCORING=choice.scoring,
            HAS_CORRECTION=correction is not None,
            IS_NORMED=choice.is_normed,
            NUM_EXPERTS=num_experts,
            EXPERT_TILE=power_of_two(num_experts),
            TOP_K=top_k,
            TOP_TILE=power_of_two(top_k),
            num_warps=1,
        )
    return ids, weights


@partial(jit, any_alignment=["logits", "correction", "ids", "weights"])
def _choose(
    logits: tl.pointer_type,
    correction: tl.pointer_type,
    ids: tl.pointer_type,
    weights: tl.pointer_type,
    stride: tl.tensor,
    least_sum: tl.tensor,
    factor: tl.tensor,
    SCORING: tl.constexpr,
    HAS_CORRECTION: tl.constexpr,
    IS_NORMED: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    EXPERT_TILE: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_TILE: tl.constexpr,
) -> None:
    """Choose the experts of one row in each program."""
    row = tl.program_id(0).to(tl.int64)
    experts = tl.arange(0, EXPERT_TILE)
    is_expert = experts < NUM_EXPERTS
    address = logits + row * stride + experts
    scores = tl.load(address, mask=is_expert, other=float("-inf")).to(tl.float32)
    if SCORING == "softmax":
        scores = tl.exp(scores - tl.max(scores, 0))
        scores = scores / tl.sum(scores, 0)
    elif SCORING == "sigmoid":
        scores = 1.0 / (1.0 + tl.exp(-scores))
    choice = scores
    if HAS_CORRECTION:
        choice += tl.load(correction + experts, mask=is_expert, other=0.0)
    # NaN counts as the lowest score, so a row of NaN also gets different experts.
    choice = tl.where(choice > _LEAST_CHOICE, choice, _LEAST_CHOICE)
    choice = tl.where(is_expert, choice, float("-inf"))
    top = tl.arange(0, TOP_TILE)
    chosen = tl.zeros([TOP_TILE], dtype=tl.int32)
    found = tl.zeros([TOP_TILE], dtype=tl.float32)
    for place in tl.static_range(TOP_K):
        best = tl.argmax(choice, 0)
        chosen = tl.where(top == place, best, chosen)
        score = tl.sum(tl.where(experts == best, scores, 0.0), 0)
        found = tl.where(top == place, score, found)
        choice = tl.where(experts == best, float("-inf"), choice)
    is_top = top < TOP_K
    if SCORING == "softmax_of_best":
        found = tl.where(is_top, found, float("-inf"))
        found = tl.exp(found - tl.max(found, 0))
        found = found / tl.sum(found, 0)
    if IS_NORMED:
        total = tl.sum(tl.where(is_top, found, 0.0), 0)
        if SCORING == "sigmoid":
            total += 1e-20  # all may be 0
        else:
            total = tl.where(total < least_sum, least_sum, total)
        found = found / total
    found = found * factor
    places = row * TOP_K + top
    tl.store(ids + places, chosen.to(tl.int64), mask=is_top)
    tl.store(weights + places, cast(found, weights.dtype.element_ty), mask=is_top)
