"""Whole engines on a pretended GPU: tokens as on a CPU, and what a step costs the host."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from msgspec.structs import replace
from torch import Tensor

from benchmarks.harness.both_roles import take_both_roles
from benchmarks.harness.local_engine import LocalEngine
from cluster.config.cluster import EngineSection
from tests.harness.pretend_gpu import DEVICE, DeviceLog, pretend_gpu
from tests.reference.goldens import golden_path
from workers.engine import engine
from workers.experts.bank import ExpertBank
from workers.requests.request import BeamParams, Request, SamplingParams, TokenOutput

OLMOE = "olmoe-norm-gqa-clip"
OTHERS = ["dots1-groups", "jetmoe-tied"]
PROMPTS = [[5, 6, 7, 8, 9], [11, 12, 13], [3] * 7]
GREEDY = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
DRAWN = SamplingParams(max_tokens=4, temperature=0.9, top_k=20, seed=3, ignore_eos=True)

PLAIN, FP8 = EngineSection(), EngineSection(kv_cache_dtype="fp8")

Outputs = Mapping[tuple[str, int], Sequence[TokenOutput]]


def requests(other: SamplingParams = DRAWN) -> list[Request]:
    params = [GREEDY, other, GREEDY]
    return [
        Request(request_id=str(i), prompt=tuple(prompt), params=own)
        for i, (prompt, own) in enumerate(zip(PROMPTS, params, strict=True))
    ]


def tokens(outputs: Outputs) -> dict[str, list[int]]:
    return {name: [t for o in own for t in o.token_ids] for (name, _), own in outputs.items()}


def path_of(variant: str | Path) -> Path:
    """The checkpoint of a golden, or this one."""
    if isinstance(variant, Path):
        return variant
    return golden_path(variant, variant.split("-")[0])


def on_cpu(
    variant: str | Path, other: SamplingParams = DRAWN, section: EngineSection = PLAIN
) -> dict[str, list[int]]:
    engine = LocalEngine(path_of(variant), dtype="float32", kernels="torch", section=section)
    return tokens(engine.run(requests(other)))


class GpuRun:
    """The same requests on a pretended GPU, and the log of each decode step."""

    def __init__(
        self,
        variant: str | Path,
        log: DeviceLog,
        prepare: Callable[[LocalEngine], object] = lambda _: None,
        other: SamplingParams = DRAWN,
        section: EngineSection = PLAIN,
    ) -> None:
        self.engine = LocalEngine(path_of(variant), dtype="float32", device=DEVICE, section=section)
        prepare(self.engine)
        self.decodes: list[DeviceLog] = []
        found: dict[tuple[str, int], list[TokenOutput]] = {}
        for request in requests(other):
            self.engine.add_request(request)
        while self.engine.engine.has_work:
            has_prompts = self.engine.engine.rows_wanted().prefill_rows > 0
            log.clear()
            for output in self.engine.step():
                found.setdefault((output.request_id, output.choice), []).append(output)
            if not has_prompts:
                self.decodes.append(DeviceLog(log.waits.copy(), log.launches.copy()))
        self.tokens = tokens(found)

    @property
    def waits(self) -> list[int]:
        """How often the host waited in each decode step."""
        return [sum(step.waits.values()) for step in self.decodes]


@pytest.mark.parametrize(
    "variant", [OLMOE, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
)
def test_tokens_are_those_of_a_cpu_and_a_decode_step_waits_once(variant: str) -> None:
    """It waits for the step before; the last one also for itself."""
    expected = on_cpu(variant)
    with pretend_gpu() as log:
        run = GpuRun(variant, log)
    assert run.tokens == expected
    assert len(run.decodes) == DRAWN.max_tokens - 1
    assert run.waits == [0, 1, 2]
    assert {step.launches["graph"] for step in run.decodes} == {1}
    for step in run.decodes[1:]:  # the first one captures
        copies = {name: step.launches.pop(name, 0) for name in ("copy_", "_to_copy", "clone")}
        assert step.launches == {"graph": 1}
        assert sum(copies.values()) <= 3  # numbers in, the choices, tokens out


def test_decode_steps_with_an_fp8_cache_are_graphs(tiny_checkpoint: Path) -> None:
    """The tokens are those of a CPU, which dequantizes blocks before it attends to them."""
    expected = on_cpu(tiny_checkpoint, section=FP8)
    with pretend_gpu() as log:
        run = GpuRun(tiny_checkpoint, log, section=FP8)
    assert run.tokens == expected
    assert run.waits == [0, 1, 2]
    assert {step.launches["graph"] for step in run.decodes} == {1}


@pytest.mark.slow
def test_a_penalty_of_one_request_leaves_the_others_to_the_graph(tiny_checkpoint: Path) -> None:
    """Its logits are processed outside of the graph, and the host still waits once."""
    other = replace(DRAWN, frequency_penalty=1.5, top_k=0)
    expected = on_cpu(tiny_checkpoint, other)
    with pretend_gpu() as log:
        run = GpuRun(tiny_checkpoint, log, other=other)
    assert run.tokens == expected
    assert set(run.waits) == {1}
    assert {step.launches["_draw"] for step in run.decodes[1:]} == {1}


@pytest.mark.slow
def test_without_graphs_a_decode_step_waits_once_too(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = on_cpu(OLMOE)
    monkeypatch.setattr(engine, "buckets_up_to", lambda most: ())
    with pretend_gpu() as log:
        run = GpuRun(OLMOE, log)
    assert run.tokens == expected
    assert {step.launches["graph"] for step in run.decodes} == {0}
    assert set(run.waits) == {1}


@pytest.mark.slow
def test_beams_are_those_of_a_cpu_and_their_steps_are_graphs() -> None:
    """The host waits for the drawn tokens and for the candidates; blocks are copied in place."""
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True, beams=BeamParams())
    request = Request(request_id="r", prompt=(5, 6, 7, 8, 9), params=params, n=3)
    path = golden_path(OLMOE, "olmoe")
    expected = LocalEngine(path, dtype="float32", kernels="torch").run([request])
    with pretend_gpu() as log:
        local = LocalEngine(path, dtype="float32", device=DEVICE)
        local.add_request(request)
        found = dict[tuple[str, int], list[TokenOutput]]()
        local.step()
        while local.engine.has_work:
            log.clear()
            for output in local.step():
                found.setdefault((output.request_id, output.choice), []).append(output)
            assert (sum(log.waits.values()), log.launches["graph"]) == (2, 1)
    assert [found["r", c][0].token_ids for c in range(3)] == [
        expected["r", c][0].token_ids for c in range(3)
    ]


@pytest.mark.slow
def test_with_both_roles_a_decode_step_is_a_graph_and_waits_once() -> None:
    """Flags and counts of the experts come to the host while it waits for the tokens."""
    expected = on_cpu(OLMOE)
    with pretend_gpu() as log:
        run = GpuRun(OLMOE, log, take_both_roles)
    assert run.tokens == expected
    assert set(run.waits) == {1}
    assert {step.launches["graph"] for step in run.decodes} == {1}
    assert max(sum(step.launches.values()) for step in run.decodes[1:]) <= 130


@pytest.mark.slow
@pytest.mark.parametrize(
    "buckets",
    [
        pytest.param((3,), id="graphs"),
        pytest.param((8,), id="padding"),
        pytest.param((), id="no graphs"),
    ],
)
def test_experts_count_what_they_computed(
    monkeypatch: pytest.MonkeyPatch, buckets: tuple[int, ...]
) -> None:
    """Each replay of a graph as a step, without rows of padding, and its capture not at all."""
    monkeypatch.setattr(engine, "buckets_up_to", lambda most: buckets)
    dispatchers = []
    with pretend_gpu() as log:
        run = GpuRun(OLMOE, log, lambda own: dispatchers.append(take_both_roles(own)))
    assert {step.launches["graph"] for step in run.decodes} == {len(buckets)}
    assert set(run.waits) == {1 if buckets else 2}
    config, banks = run.engine.config, run.engine.banks
    num_rows = sum(map(len, PROMPTS)) + len(PROMPTS) * (GREEDY.max_tokens - 1)
    num_pairs = num_rows * sum(bank.top_k for bank in banks)
    stats = dispatchers[0]._server.stats()
    assert stats["expert_worker_tokens_total"] == num_pairs
    num_decodes = GREEDY.max_tokens - 1
    num_rows += num_decodes * (max((len(PROMPTS), *buckets)) - len(PROMPTS))
    sums = num_rows * len(banks) * config.hidden_size * 4
    assert stats['dispatch_bytes_total{direction="combine"}'] == sums


@pytest.mark.slow
def test_steps_that_are_measured_are_graphs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.metrics.step_metrics.SAMPLE_INTERVAL", 2)
    with pretend_gpu() as log:
        run = GpuRun(OLMOE, log, take_both_roles)
    assert [step.launches["graph"] for step in run.decodes] == [1, 1, 1]
    assert set(run.waits) == {1}


ASKED: dict[str, dict[str, Any]] = {
    "penalties": {"presence_penalty": 1.0, "repetition_penalty": 1.3},
    "bias": {"logit_bias": ((5, 3.0), (9, -2.0))},
    "banned": {"min_tokens": 4, "stop_token_ids": (7,), "ignore_eos": False},
    "allowed": {"allowed_token_ids": (3, 4, 5, 6)},
    "min_p": {"temperature": 0.8, "min_p": 0.1, "seed": 1},
}
"""Sampling parameters by what they change."""
READ: dict[str, dict[str, Any]] = {
    "top_p": {"temperature": 0.8, "top_p": 0.9, "seed": 1},
    "logprobs": {"logprobs": 3},
    "named": {"logprobs": 3, "logprob_token_ids": (4, 5)},
}
"""Those of which the host reads another number."""


def waits_of(params: Mapping[str, Mapping[str, Any]]) -> set[int]:
    """Of the decode steps of requests with these parameters and a plain one."""
    found = set()
    with pretend_gpu() as log:
        engine = LocalEngine(golden_path(OLMOE, "olmoe"), dtype="float32", device=DEVICE)
        common = {"max_tokens": 4, "temperature": 0.0, "ignore_eos": True}
        sampling = {name: SamplingParams(**{**common, **own}) for name, own in params.items()}
        for name, asked in {**sampling, "plain": GREEDY}.items():
            engine.add_request(Request(request_id=name, prompt=(5, 6, 7), params=asked))
        engine.step()
        while engine.engine.has_work:
            log.clear()
            engine.step()
            found.add(sum(log.waits.values()))
    return found


@pytest.mark.slow
def test_processors_need_no_wait_of_their_own() -> None:
    assert waits_of(ASKED) == {1}


@pytest.mark.slow
@pytest.mark.parametrize("name", READ)
def test_what_else_the_host_reads_comes_in_one_copy(name: str) -> None:
    expected = {0, 1, 2} if name == "top_p" else {1, 2}  # the host works ahead
    assert waits_of({name: READ[name]}) <= expected


@pytest.mark.slow
def test_new_memory_of_experts_is_captured_anew() -> None:
    with pretend_gpu() as log:
        run = GpuRun(OLMOE, log)
        graphs = run.engine.engine.runner.graphs
        assert graphs is not None
        for bank in run.engine.slots.banks:
            old = [kernel_weights.zero_ for kernel_weights in weights_of(bank)]
            bank.resize(bank.num_slots + 1)
            for empty in old:  # a graph that still read it would give other tokens
                empty()
        outputs = run.engine.run(requests())
    assert tokens(outputs) == run.tokens


def weights_of(bank: ExpertBank) -> list[Tensor]:
    """The memory of all slots."""
    return [weights for kernel in bank._kernels for weights in cast(Any, kernel)._weights]
