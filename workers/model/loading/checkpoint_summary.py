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
    """Model family and sizes of a checkpoint, from ``check_checkpoint`` or ``plan_checkpoint``."""

    family: Family
    checkpoint_id: str
    attention_bytes: int
    """Bytes on disk that each attention worker loads; 0 if only ``config.json`` was read."""
    expert_bytes: int
    """Bytes on disk of all experts of all banks together; 0 if only ``config.json`` was read."""
    attention_weights: int
    """Number of weights (parameters) that each attention worker holds."""
    attention_values: int
    """Number of weights (parameters) that an attention worker reads in each step: all that it holds
    except an embedding that is not shared with lm_head."""
    expert_values: tuple[int, ...]
    """Number of weights (parameters) of one expert, for each bank."""


def check_checkpoint(
    path: Path | str, quantize: Quantize = "none", *, has_predictor: bool = False
) -> CheckpointSummary:
    """Summarize a checkpoint from its ``config.json`` and the headers of its weight files; check
    that every tensor is present with the right shape and dtype.

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
    """Summarize a checkpoint from its ``config.json`` alone, to plan for a model whose weights are
    not on this machine. Sizes on disk are 0, and the id is empty.

    Raises ``CheckpointError`` naming the first problem, and ``ConfigError`` if the model cannot be
    quantized.
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
