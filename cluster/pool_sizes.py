"""How many workers should run attention and how many hold experts, by the roofline. Pure.

For each batch every split of the workers into two pools is compared with all of them colocated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.config_checks import check
from cluster.sizing import (
    DeviceNumbers,
    ModelSize,
    StepTime,
    colocated_step,
    disaggregated_step,
    touched_experts,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolChoice:
    """The answer for one batch."""

    batch: int
    """Rows of a decode step, over all attention ranks."""
    num_attention: int
    """Attention workers of the best two pools; 0 where two pools are impossible."""
    num_experts: int
    """Expert workers of the best two pools."""
    disaggregated: StepTime | None
    """Decode step of the best two pools; None where these are impossible."""
    colocated: StepTime | None
    """Decode step of one pool; None with more workers than experts."""
    touched: float
    """Experts that the batch touches in a layer, mean over the banks."""

    @property
    def best(self) -> StepTime:
        """The faster one; equal is disaggregated."""
        found = [s for s in (self.disaggregated, self.colocated) if s is not None]
        return min(found, key=lambda step: step.step_s)

    @property
    def colocated_wins(self) -> bool:
        """Whether one pool is faster."""
        return self.best is self.colocated

    @property
    def tokens_per_s(self) -> float:
        """Decoded tokens a second of the faster one, over all requests."""
        return self.batch / self.best.step_s


def size_pools(
    model: ModelSize,
    batches: Sequence[int],
    context_tokens: float,
    *,
    num_workers: int,
    device: DeviceNumbers,
    balancedness: float = 1.0,
) -> list[PoolChoice]:
    """The best pools of ``num_workers`` for each batch.

    No expert pool is larger than the experts of a bank. Raises ``ConfigError`` for counts that
    make no sense.
    """
    experts = min((b.num_experts for b in model.banks), default=0)
    check(experts > 0, "model", "no expert bank", "must have experts")
    check(num_workers >= 1, "num_workers", num_workers, "must be at least 1")
    rule = f"must not exceed twice the {experts} experts of a bank"
    check(num_workers <= 2 * experts, "num_workers", num_workers, rule)
    check(context_tokens >= 0, "context_tokens", context_tokens, "must not be negative")
    check(0 < balancedness <= 1, "balancedness", balancedness, "must be above 0, up to 1")
    for batch in batches:
        check(batch >= 1, "batch", batch, "must be at least 1")
    question = _Question(
        model=model,
        context_tokens=context_tokens,
        num_workers=num_workers,
        num_experts=experts,
        device=device,
        balancedness=balancedness,
    )
    return [_choice(question, batch) for batch in batches]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Question:
    """The arguments of ``size_pools`` that all batches share."""

    model: ModelSize
    context_tokens: float
    num_workers: int
    num_experts: int
    device: DeviceNumbers
    balancedness: float


def _choice(question: _Question, batch: int) -> PoolChoice:
    splits = _splits(question, batch)
    attention = min(splits, key=lambda a: splits[a].step_s, default=0)
    touched = [touched_experts(b.probabilities, batch) for b in question.model.banks]
    together = question.num_workers <= question.num_experts
    return PoolChoice(
        batch=batch,
        num_attention=attention,
        num_experts=question.num_workers - attention if splits else 0,
        disaggregated=splits.get(attention),
        colocated=_together(question, batch) if together else None,
        touched=sum(touched) / len(touched),
    )


def _splits(question: _Question, batch: int) -> dict[int, StepTime]:
    """Attention workers -> the step of these two pools."""
    fewest = max(1, question.num_workers - question.num_experts)
    return {
        attention: disaggregated_step(
            question.model,
            batch,
            question.context_tokens,
            num_attention=attention,
            num_experts=question.num_workers - attention,
            device=question.device,
            balancedness=question.balancedness,
        )
        for attention in range(fewest, question.num_workers)
    }


def _together(question: _Question, batch: int) -> StepTime:
    return colocated_step(
        question.model,
        batch,
        question.context_tokens,
        num_workers=question.num_workers,
        device=question.device,
        balancedness=question.balancedness,
    )
