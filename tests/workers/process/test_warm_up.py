"""The steps of a warm-up, on CPUs."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from benchmarks.harness.local_engine import LocalEngine
from cluster.config.cluster import ClusterConfig, EngineSection
from cluster.config.kv_cache import KvCacheDType
from cluster.config.model import ModelSection
from cluster.config.workers import Device, Mode, WorkersSection
from cluster.core.topology import Member
from tests.harness.pretend_gpu import DEVICE, pretend_gpu
from tests.reference.goldens import golden_path
from tests.workers.engine.test_gpu_steps import GREEDY, OLMOE
from tests.workers.engine.test_gpu_workers import Apart
from workers.dispatch.dispatcher import TokenDispatcher
from workers.dispatch.local import LocalDispatcher
from workers.engine.engine import Engine
from workers.experts.bank import ExpertBank
from workers.experts.slots import ExpertSlots
from workers.model.compute_threads import ComputeThreads
from workers.model.loading.attention_model import load_attention_model
from workers.model.loading.checkpoint import Checkpoint
from workers.process.warm_up import ZeroDispatcher, warm_attention, warm_experts
from workers.process.worker_args import WorkerArgs
from workers.requests.request import Request, TokenOutput
from workers.requests.step_header import StepHeader

CPU = torch.device("cpu")
ROWS = (1, 2, 4, 8, 16, 32, 64)
SECTION = EngineSection(max_num_seqs=4, max_num_batched_tokens=64, max_waiting=1)


class NotedEngine(Engine):
    """An engine that writes down its steps."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        self.grants: list[tuple[int, int]] = []
        self.num_outputs = 0

    def step(self, header: StepHeader) -> list[TokenOutput]:
        grant = header.grant(0)
        self.grants.append((grant.decode_rows, grant.prefill_rows))
        outputs = super().step(header)
        self.num_outputs += sum(output.error is None for output in outputs)
        return outputs


def args_of(device: Device, mode: Mode = "disaggregated", context: int = 128) -> WorkerArgs:
    config = ClusterConfig(
        model=ModelSection(path="p", served_model_name="m", max_model_len=context),
        workers=WorkersSection(device=device, mode=mode),
        engine=SECTION,
    )
    member = Member(name="attention-0", role="attention", rank=0, device=-1)
    return WorkerArgs(config=config, member=member, control_address="", host="")


class Warmed:
    """Attention of the tiny model on the CPU, warmed as on a GPU."""

    def __init__(self, path: Path, args: WorkerArgs) -> None:
        checkpoint = Checkpoint(path)
        self.family = checkpoint.family
        context = args.config.model.max_model_len
        self._values = {
            "model": load_attention_model(
                checkpoint, torch.float32, CPU, context, ComputeThreads(), False, None
            ),
            "config": checkpoint.config,
            "banks": self.family.banks,
            "max_model_len": context,
        }
        slots = ExpertSlots(self.family.banks, 8, torch.float32, CPU)
        slots.load_all(checkpoint)
        self.local = LocalDispatcher(slots.banks, self.family.banks)
        self.engines: list[NotedEngine] = []
        self.dispatchers: list[TokenDispatcher] = []
        with mock.patch("workers.process.warm_up.warm_kernels"):
            warm_attention(args, self.family, torch.float32, self._make, self.local)

    def _make(self, dispatcher: TokenDispatcher, section: EngineSection) -> Engine:
        self.dispatchers.append(dispatcher)
        engine = NotedEngine(dispatcher=dispatcher, section=section, **self._values)
        self.engines.append(engine)
        return engine


@pytest.mark.parametrize(("context", "prompts"), [(128, 64), (8, 20)])
def test_attention_runs_a_step_of_each_kind(
    context: int, prompts: int, tiny_checkpoint: Path
) -> None:
    warmed = Warmed(tiny_checkpoint, args_of("cuda", context=context))
    [engine] = warmed.engines
    assert engine.grants == [(0, prompts), (4, 0), (4, 0), (0, 1), (1, 0), (1, 0)]
    assert engine.num_outputs == 3 * 5
    assert not engine.has_work
    assert isinstance(warmed.dispatchers[0], ZeroDispatcher)


def test_experts_of_the_same_process_take_part(tiny_checkpoint: Path) -> None:
    warmed = Warmed(tiny_checkpoint, args_of("cuda", mode="local"))
    assert warmed.dispatchers == [warmed.local]
    assert warmed.engines[0].num_outputs == 3 * 5


@pytest.mark.parametrize("sums_are_rounded", [False, True])
def test_experts_compute_one_row_and_more_up_to_the_most_of_a_step(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, sums_are_rounded: bool
) -> None:
    slots = ExpertSlots(Checkpoint(tiny_checkpoint).family.banks, 2, torch.bfloat16, CPU)
    seen: list[tuple[str, int, torch.dtype]] = []
    for name in ("compute", "compute_rows"):
        monkeypatch.setattr(ExpertBank, name, _noting(name, getattr(ExpertBank, name), seen))
    warm_experts(args_of("cuda"), slots, sums_are_rounded)
    kinds = {
        "compute": torch.bfloat16,
        "compute_rows": torch.bfloat16 if sums_are_rounded else torch.float32,
    }
    each = [(name, rows, kind) for rows in ROWS for name, kind in kinds.items()]
    assert seen == each * len(slots.banks)


def _noting(
    name: str, whole: Callable[..., Tensor], seen: list[tuple[str, int, torch.dtype]]
) -> Any:
    def noted(bank: ExpertBank, exchange: int, inputs: Tensor, *more: Any) -> Tensor:
        outputs = whole(bank, exchange, inputs, *more)
        seen.append((name, len(inputs), outputs.dtype))
        return outputs

    return noted


def test_cpus_are_warm(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Warmed(tiny_checkpoint, args_of("cpu")).engines == []
    monkeypatch.setattr(ExpertBank, "compute", None)
    slots = ExpertSlots(Checkpoint(tiny_checkpoint).family.banks, 2, torch.float32, CPU)
    warm_experts(args_of("cpu"), slots, sums_are_rounded=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "kind"), [(OLMOE, "auto"), ("dots1-groups", "auto"), (OLMOE, "fp8")]
)
def test_serving_needs_no_kernel_that_the_warm_up_did_not_compile(
    variant: str, kind: KvCacheDType
) -> None:
    """Decodes of all sizes, chunks of prompts and prefixes from the cache, experts elsewhere."""
    path = golden_path(variant, variant.split("-")[0])
    section = EngineSection(
        max_num_seqs=4, max_num_batched_tokens=16, block_size_tokens=4, kv_cache_dtype=kind
    )
    config = replace(args_of("cuda").config, engine=section)
    args = replace(args_of("cuda"), config=config)
    checkpoint = Checkpoint(path)
    with pretend_gpu() as log, torch.no_grad():
        serving = LocalEngine(
            checkpoint, dtype="float32", device=DEVICE, section=section, max_model_len=64
        )
        make = partial(
            Engine,
            model=serving._model,
            config=serving.config,
            banks=serving.banks,
            max_model_len=64,
        )
        made: list[weakref.ref[Engine]] = []

        def noting(**more: Any) -> Engine:
            engine = make(**more)
            made.append(weakref.ref(engine))
            return engine

        warm_attention(args, checkpoint.family, torch.float32, noting, serving.dispatcher)
        assert [engine() for engine in made] == [None], "its memory is for the one that serves"
        warm_experts(args, serving.slots, sums_are_rounded=False)
        warm, log.forms = log.forms, set()
        run = Apart(log, num_ranks=2, engine=serving)
        for length in (3, 20):
            prompt = (7, *range(3, 2 + length))
            asked = [Request(request_id=str(i), prompt=prompt, params=GREEDY) for i in range(4)]
            run.engine.run(asked)
    assert log.forms
    assert log.forms <= warm
