"""Routers: the selection of each row's experts, and their weights.

``Routing`` has the parameters of the selection, and ``Router`` computes it. ``torch.topk`` resolves
ties.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from workers.model.attention_batch import Recorder
from workers.model.layers import Linear, row_sigmoid

Scoring = Literal["softmax", "softmax_of_best", "sigmoid", "float32_softmax"]
"""Function from router logits to expert weights. ``softmax``: probabilities among all experts.
``softmax_of_best``: probabilities among the selected experts only. ``sigmoid``: each expert
separately. ``float32_softmax``: as softmax, but the product, the weights and all intermediate
results are float32, as for ``sigmoid``, not the model dtype."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Routing:
    """Parameters of a router: how the experts of a row are selected and weighted."""

    bank: int
    """Index of the bank (the router's experts), ``BankSpec.index``."""
    num_experts: int
    """E: number of experts."""
    top_k: int
    """k: number of experts per row."""
    scoring: Scoring
    float32_product: bool = False
    """Whether the logits are computed in float32 for any ``scoring``; for ``sigmoid`` and
    ``float32_softmax`` they always are."""
    is_normed: bool = False
    """Whether the weights of the selected experts are scaled to sum 1."""
    least_sum: float = 0.0
    """Lower bound of the sum by which weights are divided if ``is_normed``; not used by
    ``sigmoid``."""
    scale: float = 1.0
    """Factor of the final weights, for ``sigmoid`` and ``float32_softmax``; other scorings ignore
    it."""
    num_groups: int = 1
    """Number of groups of consecutive experts, for group-limited selection; 1: no groups."""
    top_groups: int = 1
    """Number of groups from which a row's experts are selected: the groups with the highest sum of
    their two best scores (sigmoid), or with the best expert."""

    @property
    def has_float32_weights(self) -> bool:
        return self.scoring in ("sigmoid", "float32_softmax")

    @property
    def has_float32_logits(self) -> bool:
        return self.float32_product or self.has_float32_weights


@dataclass(frozen=True, slots=True)
class Routes:
    """Experts that a router selected for each row, and their weights."""

    bank: int
    """Index of the bank (the router's experts), ``BankSpec.index``."""
    topk_ids: Tensor
    """Logical experts of each row, [T, k] int64, the best first."""
    topk_weights: Tensor
    """Weights of the experts in ``topk_ids``, [T, k] in the model dtype or float32; see
    ``Scoring``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Router:
    """Router of one bank of experts: selects and weights the experts of each row."""

    routing: Routing
    linear: Linear
    """Product that turns a row [H] into logits [E] of the experts."""
    correction: Tensor | None = None
    """[E] float32: bias added to the experts' scores to select experts; the weights are computed
    from scores without bias. None: no bias."""

    def route(self, rows: Tensor, recorder: Recorder | None) -> Routes:
        """Select the experts of ``rows`` [T, H], which are in the model dtype. ``recorder``, unless
        None, receives logits and selected experts."""
        routing = self.routing
        logits = self.linear(rows.float() if routing.has_float32_logits else rows)
        match routing.scoring:
            case "softmax" | "float32_softmax":
                scores = torch.softmax(logits, -1, dtype=torch.float32)
                ids, weights = self._best_of(scores)
            case "softmax_of_best":
                ids, best = self._best_of(logits.float())
                weights = torch.softmax(best, -1)
            case "sigmoid":
                ids, weights = self._best_of(row_sigmoid(logits))
        if routing.is_normed:
            sums = weights.sum(-1, keepdim=True)
            is_sigmoid = routing.scoring == "sigmoid"  # which may all be 0
            weights = weights / (sums + 1e-20 if is_sigmoid else sums.clamp(min=routing.least_sum))
        is_exact = routing.has_float32_weights
        weights = weights * routing.scale if is_exact else weights.to(rows.dtype)
        if recorder is not None:
            recorder.router(routing.bank, logits, ids, weights)
        return Routes(routing.bank, ids, weights)

    def _best_of(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ids [T, k] of the experts with the best corrected scores, and the scores of
        these experts without correction. ``scores``: [T, E]."""
        choice = scores if self.correction is None else scores + self.correction
        ids = self._within_groups(choice).topk(self.routing.top_k, dim=-1).indices
        return ids, scores.gather(1, ids)

    def _within_groups(self, choice: Tensor) -> Tensor:
        """Return the scores [T, E], with -inf for experts outside each row's best groups."""
        routing = self.routing
        if routing.top_groups == routing.num_groups:
            return choice
        grouped = choice.view(len(choice), routing.num_groups, -1)
        num_counted = 2 if routing.scoring == "sigmoid" else 1
        sums = grouped.topk(num_counted, dim=-1).values.sum(-1)
        best = sums.topk(routing.top_groups, dim=-1).indices
        is_out = torch.ones(grouped.shape[:2], dtype=torch.bool, device=choice.device)
        is_out.scatter_(1, best, False)
        return grouped.masked_fill(is_out.unsqueeze(-1), float("-inf")).flatten(1)
