"""Sizes of a checkpoint, from its headers or from its config alone, without reading weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.config.model import Quantize
from workers.model.families.base import Family
from workers.model.loading.checkpoint import Checkpoint
from workers.model.loading.config_file import read_family
from workers.model.loading.expert_format import kept_banks


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointSummary:
    """Result of ``check_checkpoint`` and ``plan_checkpoint``."""

    family: Family
    checkpoint_id: str
    attention_bytes: int
    """Bytes on disk that each attention worker loads; 0 if nothing is on disk."""
    expert_bytes: int
    """Bytes on disk of all experts of all banks together."""
    attention_weights: int
    """Number of weights that an attention rank holds."""
    attention_values: int
    """Number of weights that an attention rank reads in each step, without an untied embedding."""
    expert_values: tuple[int, ...]
    """Number of weights of one expert, by bank."""


def check_checkpoint(
    path: Path | str, quantize: Quantize = "none", *, has_predictor: bool = False
) -> CheckpointSummary:
    """Read config and headers, and check every tensor's presence, shape and dtype.

    Raises ``CheckpointError`` naming the first problem, and ``ConfigError`` if the model cannot be
    quantized.
    """
    checkpoint = Checkpoint(path, quantize=quantize, has_predictor=has_predictor)
    family = checkpoint.family
    return replace(
        _summary_of(family),
        checkpoint_id=checkpoint.checkpoint_id,
        attention_bytes=sum(checkpoint.num_bytes(p) for p in family.attention_tensors()),
        expert_bytes=sum(
            checkpoint.expert_bytes(bank, e)
            for bank in family.banks
            for e in range(bank.num_experts)
        ),
    )


def plan_checkpoint(
    path: Path | str, quantize: Quantize = "none", *, has_predictor: bool = False
) -> CheckpointSummary:
    """Return a summary from ``config.json`` alone, to plan for a model whose weights are not here.

    Raises the errors of ``check_checkpoint``.
    """
    family = read_family(Path(path), has_predictor)
    family.banks = kept_banks(quantize, family, {})
    return _summary_of(family)


def _summary_of(family: Family) -> CheckpointSummary:
    config = family.config
    weights = sum(math.prod(part.part_shape) for part in family.attention_tensors())
    is_looked_up = bool(config.labels) or not config.tie_word_embeddings
    return CheckpointSummary(
        family=family,
        checkpoint_id="",
        attention_bytes=0,
        expert_bytes=0,
        attention_weights=weights,
        attention_values=weights - is_looked_up * config.vocab_size * config.hidden_size,
        expert_values=tuple(
            sum(math.prod(shape) for _, _, shape in bank.matrices) for bank in family.banks
        ),
    )
