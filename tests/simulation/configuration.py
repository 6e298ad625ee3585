"""The configuration of a simulated cluster, as its scenario has it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from cluster.config.autoscale import AutoscaleSection
from cluster.config.cluster import ClusterConfig, EngineSection
from cluster.config.expert_load import LoadSection, RebalanceSection
from cluster.config.gateway import GatewaySection
from cluster.config.kv_tiers import KvTiersSection
from cluster.config.lora import LoraSection
from cluster.config.model import ModelSection
from cluster.config.speculation import SpeculationSection
from cluster.config.workers import WorkersSection
from tests.simulation.scenario import Scenario
from tests.simulation.toy_adapters import ADAPTERS
from tests.simulation.toy_model import BLOCK_TOKEN_BYTES

BLOCK_TOKENS = 4
_BLOCK_BYTES = BLOCK_TOKEN_BYTES * BLOCK_TOKENS


def num_prefill(scenario: Scenario) -> int:
    """Number of prefill workers at the start; 0 without step groups."""
    has_other = scenario.autoscales or scenario.hosts.are_followed
    has_groups = "groups" in scenario.features and not has_other
    return scenario.num_attention // 2 if has_groups else 0


def _attention_workers(scenario: Scenario) -> dict[str, Any]:
    number, prefill = scenario.num_attention, num_prefill(scenario)
    if not prefill:
        return {"num_attention_workers": number}
    has_own = scenario.num_experts > 1 and scenario.seed % 2
    return {
        "num_prefill_workers": prefill,
        "num_decode_workers": number - prefill,
        "share_experts": "no" if has_own else "yes",
    }


def cluster_config(
    scenario: Scenario, state: Path | None = None, kv_disk: Path | None = None
) -> ClusterConfig:
    """``state`` is the folder of the gateways' state, ``kv_disk`` the one with those of the hosts
    for KV blocks; None: there is none."""
    features = scenario.features
    adapters = ADAPTERS if "adapters" in features else {}
    return ClusterConfig(
        model=ModelSection(path="toy", served_model_name="toy"),
        cluster_token="secret",
        workers=WorkersSection(
            **_attention_workers(scenario),
            num_expert_workers=scenario.num_experts,
            num_redundant_experts=scenario.num_redundant,
            cpus_per_worker=1.0,
            follow_nodes=scenario.hosts.are_followed,
            device="cpu",
        ),
        engine=EngineSection(
            block_size_tokens=BLOCK_TOKENS,
            kv_cache_bytes=8 * BLOCK_TOKENS * scenario.num_kv_blocks,
            max_num_seqs=8,
            max_num_batched_tokens=64,
            num_micro_batches=1,
        ),
        load=LoadSection(report_s=1.0, window_s=2.0, half_life_s=2.0),
        rebalance=RebalanceSection(
            enable_eplb=scenario.moves_experts,
            interval_s=2.0,
            max_move_fraction=0.5,
            slot_cost_pairs=0.0,
        ),
        autoscale=_autoscale(scenario),
        kv_tiers=_kv_tiers(scenario.seed, kv_disk) if "tiers" in features else KvTiersSection(),
        gateway=GatewaySection(state_dir=None if state is None else str(state)),
        lora=LoraSection(lora_modules=tuple(f"{name}={path}" for name, path in adapters.items())),
        speculation=SpeculationSection(
            speculative_method="ngram" if "drafts" in features else "none"
        ),
    )


def _kv_tiers(seed: int, disk: Path | None) -> KvTiersSection:
    """Host memory for copies of a part of the blocks, or of all that there ever are; of a smaller
    part where a disk has more of them."""
    rng = random.Random(f"tiers {seed}")
    host_blocks, copy_bytes_per_s = rng.choice((32, 128, 4000)), rng.choice((1e3, 1e6))
    disk_blocks = 0
    if disk is not None:
        host_blocks, disk_blocks = rng.choice((16, 32)), rng.choice((128, 4000))
    return KvTiersSection(
        kv_host_bytes=_BLOCK_BYTES * host_blocks,
        kv_disk_bytes=_BLOCK_BYTES * disk_blocks,
        kv_disk_dir=None if disk is None else str(disk),
        session_copy_bytes_per_s=copy_bytes_per_s,
    )


def _autoscale(scenario: Scenario) -> AutoscaleSection:
    """Times as short as the scenario, and targets that its load exceeds now and then."""
    if not scenario.autoscales or scenario.hosts.are_followed:
        return AutoscaleSection()
    return AutoscaleSection(
        autoscale="on",
        min_attention_workers=1,
        max_attention_workers=scenario.num_attention + 1,
        min_expert_workers=1,
        max_expert_workers=scenario.num_experts + 2,
        kv_target=0.3,
        slot_time_target=0.2,
        up_s=1.0,
        down_s=2.0,
        limit_s=5.0,
        queue_s=0.5,
        sample_s=0.25,
        retry_s=1.0,
    )
