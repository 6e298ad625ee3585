"""Memory of a worker's GPU, whose CUDA edge is faked."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from cluster.config.cluster import ClusterConfig, EngineSection
from cluster.config.model import ModelSection
from cluster.config.workers import WorkersSection
from cluster.core.errors import ConfigError
from cluster.core.topology import Member
from tests.paths import DEMO
from workers.model.families.registry import load_family
from workers.model.loading.checkpoint import Checkpoint
from workers.process.gpu_memory import (
    captured_sizes,
    check_memory_for_slots,
    check_memory_for_states,
    expert_step_bytes,
    graph_bytes,
    logits_bytes,
    section_for_gpu,
    step_bytes,
)
from workers.process.worker_args import WorkerArgs
from workers.requests.buckets import buckets_up_to
from workers.transport.collective import CollectiveTransport

GIB = 1 << 30
NCCL_BYTES = 128 << 20
FAMILY = Checkpoint(DEMO).family


@dataclass
class FakeGpu:
    """A GPU of 24 GiB, 20 of them free."""

    calls: list[str] = field(default_factory=list)

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        assert device == torch.device("cuda:0")
        self.calls.append("look")
        return 20 * GIB, 24 * GIB

    def empty_cache(self) -> None:
        self.calls.append("give back")

    def memory_reserved(self, device: torch.device) -> int:
        return 3 * GIB


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    fake = FakeGpu()
    for name in ("mem_get_info", "empty_cache", "memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    return fake


NO_TRANSPORT: Any = None


def args_of(device: Any = "cuda", num_slots: int = 4, **engine: Any) -> WorkerArgs:
    config = ClusterConfig(
        model=ModelSection(path="p", served_model_name="m"),
        workers=WorkersSection(device=device, gpus_per_worker=1.0 if device == "cuda" else 0.0),
        engine=EngineSection(**engine),
    )
    member = Member(name="attention-0", role="attention", rank=0, device=-1)
    return WorkerArgs(
        config=config, member=member, control_address="", host="", num_slots=num_slots
    )


def sized(args: WorkerArgs, transport: Any = None) -> EngineSection:
    return section_for_gpu(args, FAMILY, torch.bfloat16, transport)


def test_kv_of_a_gpu_is_what_steps_leave(gpu: FakeGpu) -> None:
    args = args_of()
    found = sized(args)
    kept = step_bytes(FAMILY.config, FAMILY.banks, args.config.engine)
    kept += graph_bytes(FAMILY.config, FAMILY.banks, buckets_up_to(64), num_peers=2)
    kept += logits_bytes(FAMILY.config, buckets_up_to(64))
    assert found.kv_cache_bytes == int(0.9 * 24 * GIB) - 4 * GIB - kept
    assert gpu.calls == ["give back", "look"]
    assert replace(found, kv_cache_bytes=None) == args.config.engine


def test_nccl_takes_a_part_for_each_peer(gpu: FakeGpu) -> None:
    without = sized(args_of()).kv_cache_bytes
    with_nccl = sized(args_of(), CollectiveTransport.__new__(CollectiveTransport)).kv_cache_bytes
    assert without is not None
    assert with_nccl == without - 2 * NCCL_BYTES


def test_larger_steps_take_more() -> None:
    small, large = (
        step_bytes(FAMILY.config, FAMILY.banks, EngineSection(max_num_batched_tokens=n))
        for n in (512, 4096)
    )
    rows = 4096 - 512
    top_k = FAMILY.banks[0].top_k
    assert large - small >= rows * top_k * FAMILY.config.hidden_size * 4


def test_recurrent_states_come_before_kv(gpu: FakeGpu) -> None:
    family = load_family({"model_type": "qwen3_next", "num_hidden_layers": 4})
    args = args_of(max_num_seqs=4, num_cached_states=2, enforce_eager=True)
    with_states = section_for_gpu(args, family, torch.bfloat16, NO_TRANSPORT).kv_cache_bytes
    attention = load_family(
        {"model_type": "qwen3_next", "num_hidden_layers": 4, "layer_types": ["full_attention"] * 4}
    )
    without = section_for_gpu(args, attention, torch.bfloat16, NO_TRANSPORT).kv_cache_bytes
    assert without is not None
    assert with_states == without - (3 * 4 + 2 + 1) * family.config.state_bytes


def test_states_of_too_many_sequences_are_refused_before_the_warm_up(gpu: FakeGpu) -> None:
    family = load_family({"model_type": "qwen3_next"})
    check_memory_for_states(args_of(max_num_seqs=64), family)
    many = 20 * GIB // family.config.state_bytes // 3
    with pytest.raises(ConfigError, match=rf"max_num_seqs \({many}\) must be less: recurrent"):
        check_memory_for_states(args_of(max_num_seqs=many), family)
    unshared = {"max_num_seqs": many, "enable_prefix_caching": False, "num_cached_states": 0}
    check_memory_for_states(args_of(**unshared), family)  # two for each sequence
    check_memory_for_states(args_of("cpu", max_num_seqs=many), family)
    assert captured_sizes(args_of(max_num_seqs=4), family) == ()


def test_a_given_size_wins(gpu: FakeGpu) -> None:
    assert sized(args_of(kv_cache_bytes=GIB)).kv_cache_bytes == GIB
    with pytest.raises(ConfigError, match=r"kv_cache_bytes \(21 GiB\) must fit into the 20 GiB"):
        sized(args_of(kv_cache_bytes=21 * GIB))


@pytest.mark.usefixtures("gpu")
def test_a_gpu_that_is_too_small_is_named_before_anything_is_allocated() -> None:
    with pytest.raises(ConfigError, match=r"gpu_memory_utilization \(0.1\) must leave memory for"):
        sized(args_of(gpu_memory_utilization=0.1))
    each = sum(out * width for _, _, (out, width) in FAMILY.banks[0].matrices) * 2
    section, peers = args_of().config.engine, args_of().config.workers.num_attention_ranks
    kept = expert_step_bytes(FAMILY.config, FAMILY.banks, peers * section.step_tokens)
    kept += graph_bytes(FAMILY.config, FAMILY.banks, buckets_up_to(64), peers)
    kept += peers * NCCL_BYTES
    room = (20 * GIB - kept) // (each * len(FAMILY.banks))
    check_memory_for_slots(args_of(num_slots=room), FAMILY, torch.bfloat16)
    with pytest.raises(ConfigError, match=r"num_expert_workers \(2\) must be more"):
        check_memory_for_slots(args_of(num_slots=room + 1), FAMILY, torch.bfloat16)


def test_cpus_are_not_asked() -> None:
    args = args_of(device="cpu")
    assert sized(args) is args.config.engine
    check_memory_for_slots(args_of(device="cpu", num_slots=10**9), FAMILY, torch.bfloat16)


def test_captured_steps_take_memory_by_peer_unless_there_are_none() -> None:
    config, banks = FAMILY.config, FAMILY.banks
    one, two = (graph_bytes(config, banks, (1, 2, 4), n) for n in (1, 2))
    assert two - one == 2 * (1 + 2 + 4) * config.hidden_size * 4 * 2 * len(banks)
    assert graph_bytes(config, banks, (), 2) == 0
    assert logits_bytes(config, (1, 4)) == 2 * 4 * config.vocab_size * 4, "of two micro-batches"
    assert logits_bytes(config, ()) == 0


def test_steps_have_buckets_where_they_can_be_captured() -> None:
    assert captured_sizes(args_of(max_num_seqs=4), FAMILY) == (1, 2, 4)
    assert captured_sizes(args_of(max_num_seqs=4, kv_cache_dtype="fp8"), FAMILY) == (1, 2, 4)
    for other in ({"enforce_eager": True}, {"combine_mode": "per_slot"}):
        assert captured_sizes(args_of(**other), FAMILY) == ()
    assert captured_sizes(args_of(device="cpu"), FAMILY) == ()
