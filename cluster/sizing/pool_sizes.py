"""Computes the sizes of the attention and the expert pool with the roofline formulas. Pure.

For each batch, every split of the workers into two pools is compared with one colocated pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from cluster.core.checks import check
from cluster.sizing.roofline import (
    DeviceSpec,
    ModelSize,
    StepTime,
    activated_experts,
    colocated_step,
    disaggregated_step,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolChoice:
    """The best pool sizes for one batch size."""

    batch: int
    """Number of rows of a decode step, over all attention ranks."""
    num_attention: int
    """Number of attention workers in the best split into two pools; 0 if no split is possible."""
    num_experts: int
    """Number of expert workers in the best split into two pools; 0 if no split is possible."""
    disaggregated: StepTime | None
    """Predicted decode step of the best split into two pools; None if no split is possible."""
    colocated: StepTime | None
    """Predicted decode step of one colocated pool; None if there are more workers than experts."""
    activated: float
    """Number of experts that the batch activates in a layer, averaged over the banks."""

    @property
    def best(self) -> StepTime:
        """Predicted decode step of the faster layout; disaggregated if equal."""
        found = [s for s in (self.disaggregated, self.colocated) if s is not None]
        return min(found, key=lambda step: step.step_s)

    @property
    def colocated_wins(self) -> bool:
        return self.best is self.colocated

    @property
    def tokens_per_s(self) -> float:
        """Decoded tokens per second of the faster layout, over all requests."""
        return self.batch / self.best.step_s


def size_pools(
    model: ModelSize,
    batches: Sequence[int],
    context_tokens: float,
    *,
    num_workers: int,
    device: DeviceSpec,
    balancedness: float = 1.0,
) -> list[PoolChoice]:
    """Return the best pool sizes of ``num_workers`` workers for each batch size.

    No expert pool has more workers than a bank has experts. Raises ``ConfigError`` for invalid
    counts.
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
    apart = partial(
        disaggregated_step,
        model,
        context_tokens=context_tokens,
        device=device,
        balancedness=balancedness,
    )
    together = partial(
        colocated_step,
        model,
        context_tokens=context_tokens,
        num_workers=num_workers,
        device=device,
        balancedness=balancedness,
    )
    fewest = max(1, num_workers - experts)
    found = []
    for batch in batches:
        splits = {
            attention: apart(batch, num_attention=attention, num_experts=num_workers - attention)
            for attention in range(fewest, num_workers)
        }
        best = min(splits, key=lambda a: splits[a].step_s, default=0)
        activated = [activated_experts(b.probabilities, batch) for b in model.banks]
        found.append(
            PoolChoice(
                batch=batch,
                num_attention=best,
                num_experts=num_workers - best if splits else 0,
                disaggregated=splits.get(best),
                colocated=together(batch) if num_workers <= experts else None,
                activated=sum(activated) / len(activated),
            )
        )
    return found
