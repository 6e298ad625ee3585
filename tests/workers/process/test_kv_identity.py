"""Blocks on disk are of use to workers that compute the same bits, and to no others."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace as changed

from benchmarks.harness.local_engine import LocalEngine
from benchmarks.harness.members import member_of
from cluster.config.cluster import ClusterConfig
from cluster.config.model import ModelSection, Quantize
from cluster.core.arithmetic import ArithmeticOffer
from cluster.core.topology import Generation, Member
from tests.workers.kv.transfer.test_store import engine_of
from workers.process.kv_identity import kv_identity, model_identity, needed_ranks
from workers.transport.handshake import PeerIdentity

CONFIG = ClusterConfig(model=ModelSection(path="/m", served_model_name="m", quantize="int8"))
ME = PeerIdentity(name="attention-0", role="attention", rank=0, checkpoint_id="c")
BOTH = ArithmeticOffer(kernels=("dot 1", "fma 2"), torch="t", computation="avx512_bf16")
OLD = ArithmeticOffer(kernels=("fma 2",), computation="avx2")
NONE = ArithmeticOffer(obstacle="computes experts with torch", computation="cuda H100")
NONE_EITHER = ArithmeticOffer(obstacle="computes experts with torch", computation="cuda L40")


@pytest.fixture(scope="module")
def local(tiny_checkpoint: Path) -> LocalEngine:
    return engine_of(tiny_checkpoint)


def members_of(*offers: ArithmeticOffer) -> list[Member]:
    """An attention worker with the first offer, expert workers with the others."""
    attention = changed(member_of("attention-0"), offer=offers[0])
    experts = [changed(member_of(f"expert-{n}"), offer=o) for n, o in enumerate(offers[1:])]
    return [attention, *experts]


def first_generation(*offers: ArithmeticOffer) -> Generation:
    return Generation(number=0, members=()).successor(members_of(*offers))


@pytest.fixture
def identity(local: LocalEngine) -> Any:
    def of(
        *offers: ArithmeticOffer,
        me: PeerIdentity = ME,
        config: ClusterConfig = CONFIG,
        **types: Any,
    ) -> str:
        weights = types.get("quantize", "none"), types.get("dtype", torch.float32)
        return kv_identity(me, config, first_generation(*offers), weights, local.engine.cache)

    return of


def test_it_is_what_the_generation_agreed_not_what_the_worker_can_do(identity: Any) -> None:
    with_new, with_old = identity(BOTH, BOTH), identity(BOTH, OLD)
    assert with_new != with_old
    assert identity(BOTH, OLD, BOTH) == with_old, "the same arithmetic with more workers"
    assert identity(BOTH, OLD, OLD) == with_old
    assert identity(changed(OLD, torch="t"), BOTH) == with_old, "it was agreed on for another cause"


def test_blocks_that_are_not_exact_are_never_taken_for_exact(identity: Any) -> None:
    exact, mixed = identity(BOTH, OLD), identity(BOTH, NONE)
    assert exact != mixed
    assert mixed != identity(BOTH, NONE_EITHER), "expert workers on another device"
    assert mixed == identity(BOTH, NONE, NONE)


def test_later_generations_keep_it_until_a_worker_ends_exactness(local: LocalEngine) -> None:
    first = first_generation(BOTH, OLD)
    second = first.successor(members_of(BOTH, BOTH))
    third = second.successor(members_of(BOTH, BOTH, NONE))
    fourth = third.successor(members_of(BOTH, BOTH))
    weights: tuple[Quantize, torch.dtype] = ("none", torch.float32)
    cache = local.engine.cache
    found = [
        kv_identity(ME, CONFIG, generation, weights, cache)
        for generation in (first, second, third, fourth)
    ]
    assert found[0] == found[1]
    assert len({*found[1:]}) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"me": changed(ME, checkpoint_id="d")},
        {"me": changed(ME, release="0.0.1")},
        {"me": changed(ME, expert_form="int8")},
        {"quantize": "auto"},
        {"dtype": torch.bfloat16},
        {"config": replace(CONFIG, engine=replace(CONFIG.engine, deterministic="on"))},
    ],
    ids=str,
)
def test_all_that_changes_bits_is_in_it(identity: Any, change: dict[str, Any]) -> None:
    assert identity(BOTH, BOTH, **change) != identity(BOTH, BOTH)
    assert identity(BOTH, BOTH).startswith(model_identity(ME))


CHANGES_BITS = {
    "model": "dtype quantize quantize_layers",
    "engine": "block_size_tokens kv_cache_dtype combine_mode deterministic",
    "workers": "mode device kernels",
    "speculation": "speculative_method",
    "transport": "transport",
}
CHANGES_NO_BIT = {
    "model": "path served_model_name max_model_len chat_template",
    "engine": "kv_cache_bytes gpu_memory_utilization max_num_seqs max_num_batched_tokens "
    "itl_target_ms max_waiting max_waiting_tokens enable_prefix_caching kv_kept_share "
    "num_cached_states kv_fetch_limit_s num_micro_batches micro_batch_decode_threshold "
    "micro_batch_prefill_threshold enforce_eager seed",
    "workers": "mode_reason num_attention_workers num_prefill_workers num_decode_workers "
    "share_experts "
    "num_expert_workers num_redundant_experts "
    "recovery_slots cpus_per_worker has_equal_cpus other_pools reserves_cpus "
    "threads_per_worker gpus_per_worker "
    "placement_file load_profile follow_nodes device_speed",
    "speculation": "num_speculative_tokens ngram_min ngram_max",
    "transport": "detection_limit_s heartbeat_s connect_timeout_s step_timeout_s",
}
"""The path is not the checkpoint's identity; threads and cuts count where results are not exact,
which no option promises."""
OTHERS: dict[tuple[str, str], Any] = {
    ("model", "dtype"): "bfloat16",
    ("model", "quantize"): "int4",
    ("model", "quantize_layers"): "all",
    ("engine", "block_size_tokens"): 32,
    ("engine", "kv_cache_dtype"): "fp8",
    ("engine", "combine_mode"): "per_slot",
    ("engine", "deterministic"): "on",
    ("workers", "mode"): "colocated",
    ("workers", "device"): "cpu",
    ("workers", "kernels"): "torch",
    ("speculation", "speculative_method"): "mtp",
    ("transport", "transport"): "collective",
}


@pytest.mark.parametrize("section", CHANGES_BITS)
def test_every_option_is_known_to_change_bits_or_not_to(section: str) -> None:
    names = {field.name for field in fields(getattr(CONFIG, section))}
    changing, others = CHANGES_BITS[section].split(), CHANGES_NO_BIT[section].split()
    assert names == {*changing, *others}
    for name in changing:
        values = {name: OTHERS[section, name]}
        other = replace(CONFIG, **{section: replace(getattr(CONFIG, section), **values)})
        assert other.kv_fingerprint() != CONFIG.kv_fingerprint(), name


def at(name: str, node: str) -> Member:
    return changed(member_of(name), node=node)


def test_a_node_needs_the_folders_of_its_ranks_and_of_those_to_come() -> None:
    members = (at("attention-0", "a"), at("attention-1", "b"), at("expert-3", "a"))
    generation = Generation(number=4, members=members)
    places = ("attention-0", "attention-1", "attention-2", "expert-3", "expert-4")
    assert needed_ranks(generation, places, "a") == frozenset({0, 2})
    assert needed_ranks(generation, places, "b") == frozenset({1, 2})
    assert needed_ranks(generation, places[:2], "a") == frozenset({0})
    assert needed_ranks(Generation(number=0, members=()), places, "a") is None
    assert needed_ranks(generation, (), "a") is None
