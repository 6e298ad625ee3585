"""The plan of one served model: its configuration, the facts of its checkpoint, expected load."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from cluster.config.cluster import ClusterConfig
from cluster.config.resources import NodeResources
from cluster.core.checks import check
from cluster.core.errors import ConfigError
from cluster.core.load_profile import LoadProfile, load_profile
from cluster.launch.checkpoint_check import CheckpointFacts
from cluster.sizing.gpus import gpu_spec
from cluster.sizing.mode_choice import resolve_mode
from cluster.sizing.start_plan import matches_banks

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelPlan:
    """A model that a launcher serves."""

    config: ClusterConfig
    """The model's configuration; all models have the same section ``gateway``."""
    facts: CheckpointFacts
    profile: dict[str, Any] | None
    """Load profile (token counts of experts) for the first placement; None without a profile."""

    def resolved(self, nodes: Sequence[NodeResources], free_cpus: float | None = None) -> Self:
        """Return the plan with ``--mode auto`` and ``--share-experts auto`` resolved for these
        nodes. Raises ``ConfigError``."""
        if "auto" not in (self.config.workers.mode, self.config.workers.share_experts):
            return self
        profile = LoadProfile.from_dict(self.profile) if self.profile else None
        kind = self.config.engine.kv_cache_dtype
        size = self.facts.size(self.config.model.dtype, profile, kind)
        gpu = gpu_spec(self.facts.gpu, self.facts.gpu_bandwidth_bytes_s)
        length = self.facts.context_tokens
        config = resolve_mode(self.config, size, length, nodes, free_cpus, gpu)
        return dataclasses.replace(self, config=config)


def make_model_plan(config: ClusterConfig, facts: CheckpointFacts) -> ModelPlan:
    """Check a model's configuration against its facts, and plan it. Raises ``ConfigError``."""
    limit = config.model.max_model_len
    check(
        limit is None or limit <= facts.context_tokens,
        "max_model_len",
        limit,
        f"must not exceed the model's context of {facts.context_tokens} tokens",
    )
    num_kv_blocks(config, facts)
    return ModelPlan(config=config, facts=facts, profile=_profile(config, facts.banks))


def num_kv_blocks(config: ClusterConfig, facts: CheckpointFacts) -> int:
    """Return the number of KV blocks of each attention worker.

    Raises ``ConfigError`` if not even one block fits.
    """
    kind = config.engine.kv_cache_dtype
    bytes_per_token = facts.kv_bytes_per_token(config.model.dtype, kind)
    length = config.model.max_model_len or facts.context_tokens
    return config.engine.num_kv_blocks(bytes_per_token, length)


def _profile(config: ClusterConfig, banks: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the load profile that the user has given, or else the checkpoint's; or None.

    Raises ``ConfigError`` for a given file that cannot be read or belongs to another model.
    """
    given = config.workers.load_profile
    if given is not None:
        profile = load_profile(Path(given))
        rule = f"must have the banks and experts of {config.model.served_model_name}"
        check(matches_banks(profile, banks), "load_profile", Path(given).name, rule)
        return profile.to_dict()
    path = Path(config.model.path) / "load_profile.json"
    if not path.exists():
        return None
    try:
        profile = load_profile(path)
    except ConfigError as err:
        logger.warning("the checkpoint's load profile is not used: %s", err)
        return None
    return profile.to_dict() if matches_banks(profile, banks) else None
