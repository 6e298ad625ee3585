"""Steps of all layers in one native call: the bits of the layers one by one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.harness.local_engine import LocalEngine
from cluster.config.cluster import EngineSection
from cluster.config.kv_cache import KvCacheDType
from cluster.core.placement import FREE_SLOT, BankPlacement, ExpertPlacement
from cluster.core.topology import Generation
from tests.harness.tiers import quick_rows, quick_values
from tests.reference.goldens import MAX_MODEL_LEN, Golden
from workers.dispatch.dispatcher import DispatchHandle
from workers.dispatch.local import LocalDispatcher
from workers.engine.step_result import StepResult
from workers.metrics.step_timer import StepTimer
from workers.model.attention_batch import RowChunks
from workers.model.families.native_layers import NativeMicroBatch
from workers.model.layers import Dispatch
from workers.model.loading.checkpoint import Checkpoint
from workers.requests.inspection import InspectionParams
from workers.requests.request import SamplingParams
from workers.requests.step_header import StepHeader
from workers.sampling.best_tokens import finite_rows
from workers.scheduling.step_plan import StepPlan

pytestmark = pytest.mark.heavy

SCORED = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, logprobs=3)
PROMPTS = [tuple(range(3, 40)), (5, 9, 11), tuple(range(60, 40, -1)), (7,)]
VARIANTS = [
    *("olmoe-base", "olmoe-norm-gqa-clip", "dots1-groups", "dots1-swa", "dots1-dense2-yarn"),
    *("qwen3moe-base", "qwen3moe-dense-layers", "qwen3moe-window-bias-tied"),
    *("glm4moe-base", "glm4moe-norms-groups", "glm4moe-quarter-tied"),
    *("mixtral-base", "mixtral-window-tied", "minimaxm2-official-like"),
    *("ernie45-official-like", "ernie45-layers", "gptoss-base", "gptoss-layers-tied"),
]


class Counting(LocalDispatcher):
    """Counts exchanges."""

    num_exchanges = 0

    def dispatch(self, sent: Dispatch, micro_batch: int = 0) -> DispatchHandle:
        self.num_exchanges += 1
        return super().dispatch(sent, micro_batch)


class OneByOne(Counting):
    """Has exchanges in all steps: the reference."""

    def experts(self) -> None:
        return None


def open_engine(
    of: Golden,
    kind: type[Counting] = Counting,
    dtype: str = "float32",
    kv_cache_dtype: KvCacheDType = "auto",
    num_micro_batches: int = 1,
    num_threads: int = 1,
) -> tuple[LocalEngine, Counting]:
    """Prompts go in chunks, beside decodes."""
    engine = LocalEngine(
        of.path,
        dtype=dtype,
        section=EngineSection(
            max_num_seqs=4, max_num_batched_tokens=24, kv_cache_dtype=kv_cache_dtype
        ),
        max_model_len=MAX_MODEL_LEN,
        num_micro_batches=num_micro_batches,
        num_threads=num_threads,
    )
    dispatcher = kind(engine.slots.banks, engine.banks)
    engine.engine.runner.dispatcher = dispatcher
    return engine, dispatcher


def check(found: LocalEngine, expected: LocalEngine) -> None:
    """The same KV, to the bit, and the same counts of chosen experts."""
    for cache, wanted in zip(found.engine.cache.layers, expected.engine.cache.layers, strict=True):
        assert torch.equal(cache.view(torch.uint8), wanted.view(torch.uint8))
    loads = [engine.engine.load.report() for engine in (found, expected)]
    assert loads[0].rows == loads[1].rows
    for name, counts in loads[0].banks.items():
        other = loads[1].banks[name]
        assert (counts.prefill == other.prefill).all()
        assert (counts.decode == other.decode).all()
        assert counts.prefill.sum() > 0 < counts.decode.sum()


@pytest.mark.parametrize("kv_cache_dtype", quick_rows({"auto"}, ["auto", "fp8"]))
@pytest.mark.parametrize(("variant", "dtype"), quick_values(VARIANTS, ["float32", "bfloat16"]))
def test_bits_are_those_of_one_layer_after_the_other(
    golden: Callable[[str], Golden], variant: str, dtype: str, kv_cache_dtype: KvCacheDType
) -> None:
    expected, other = open_engine(golden(variant), OneByOne, dtype, kv_cache_dtype)
    wanted = expected.generate(PROMPTS, SCORED)
    assert other.num_exchanges > 0
    for num_threads in (1, 2):
        engine, dispatcher = open_engine(
            golden(variant), Counting, dtype, kv_cache_dtype, num_threads=num_threads
        )
        assert engine.generate(PROMPTS, SCORED) == wanted
        assert dispatcher.num_exchanges == 0
        check(engine, expected)


def test_micro_batches_take_turns(golden: Callable[[str], Golden]) -> None:
    expected, _ = open_engine(golden("dots1-groups"), OneByOne, num_micro_batches=2)
    engine, dispatcher = open_engine(golden("dots1-groups"), num_micro_batches=2)
    assert engine.generate(PROMPTS, SCORED) == expected.generate(PROMPTS, SCORED)
    assert dispatcher.num_exchanges == 0
    check(engine, expected)


def test_experts_are_found_by_the_placement(
    golden: Callable[[str], Golden],
) -> None:
    expected, _ = open_engine(golden("olmoe-base"))
    wanted = expected.generate(PROMPTS, SCORED)
    engine, dispatcher = open_engine(golden("olmoe-base"))
    draw = torch.Generator().manual_seed(1)
    orders = [torch.randperm(bank.num_experts, generator=draw).tolist() for bank in engine.banks]
    maps = [
        BankPlacement.from_maps(
            bank=bank.bank,
            layer=bank.layer,
            num_experts=bank.num_experts,
            physical_to_logical=[[FREE_SLOT, *order]],
        )
        for bank, order in zip(engine.banks, orders, strict=True)
    ]
    placement = ExpertPlacement(epoch=1, banks=tuple(maps))
    engine.slots.load_placement(placement, 0, Checkpoint(golden("olmoe-base").path))
    dispatcher.set_placement(placement, Generation(number=1, members=()))
    assert engine.generate(PROMPTS, SCORED) == wanted
    assert dispatcher.num_exchanges == 0
    check(engine, expected)


def test_an_empty_slot_ends_the_step(golden: Callable[[str], Golden]) -> None:
    engine, _ = open_engine(golden("olmoe-base"))
    for slot in range(engine.banks[1].num_experts):
        engine.slots.clear(1, slot)
    with pytest.raises(IndexError, match="missing or empty"):
        engine.generate(PROMPTS[:1], SCORED)


def test_a_token_without_an_embedding_ends_the_step(golden: Callable[[str], Golden]) -> None:
    """Requests with such a token are refused before; memory behind the table is not read."""
    engine, dispatcher = open_engine(golden("olmoe-base"))
    step = engine.engine.runner._native()
    assert step is not None
    native = step.layers
    assert native.has_table
    experts = dispatcher.experts()
    assert experts is not None
    for token in (-1, engine.config.vocab_size):
        tokens = torch.tensor([3, token])
        wave = torch.ones(2, 1, engine.config.head_dim)
        rows = RowChunks(2, torch.tensor([[0, 2, 0, 0]]), np.zeros((1, 1), np.int32), 2)
        batch = rows.fields(wave, wave, engine.engine.cache.layers[0])
        flow = NativeMicroBatch(
            hidden=native.new_rows(2),
            tokens=tokens,
            batch=batch,
            experts=experts,
            top_k=native.top_k,
            logits=None,
            keeps=(rows, wave),
        )
        with pytest.raises(IndexError, match="no input"):
            native.run([flow], lambda: None, 1.0)
        assert not flow.num_begun


def test_decodes_have_their_logits_from_the_same_call(golden: Callable[[str], Golden]) -> None:
    """Prompts have not: of all their rows one draws a token."""
    engine, _ = open_engine(golden("olmoe-base"))
    runner = engine.engine.runner
    run, results = runner.run, []

    def kept(header: StepHeader, plan: StepPlan, *, is_ahead: bool = False) -> StepResult | None:
        result = run(header, plan, is_ahead=is_ahead)
        assert result is not None
        results.append((plan, result))
        return result

    runner.run = kept  # type: ignore[method-assign]
    engine.generate(PROMPTS, SCORED)
    for plan, result in results:
        is_decode = all(rows.is_decode for rows in plan.rows)
        assert (result.logits is not None) == is_decode
        assert torch.equal(result.finite, finite_rows(result.hidden))
        if result.logits is not None:
            assert torch.equal(result.logits, runner.model.head(result.hidden))
    assert any(result.logits is not None for _, result in results)
    assert any(result.logits is None for _, result in results)


def test_progress_is_reported_between_layers(golden: Callable[[str], Golden]) -> None:
    counts = []
    for advance_s in (0.0, 1000.0):
        engine, dispatcher = open_engine(golden("olmoe-base"))
        engine.engine.runner.advance_s = advance_s
        engine.generate(PROMPTS, SCORED)
        counts.append(dispatcher.activity.progress)
    assert counts[1] == engine.engine.stats()["steps_total"]
    assert counts[0] == counts[1] * len(engine.banks)


@pytest.mark.parametrize("variant", ["jetmoe-tied", "dots1-gelu-tanh-llama3"])
def test_other_layers_have_exchanges(golden: Callable[[str], Golden], variant: str) -> None:
    engine, dispatcher = open_engine(golden(variant))
    engine.generate(PROMPTS, SCORED)
    assert dispatcher.num_exchanges > 0


def test_what_looks_between_layers_has_exchanges(golden: Callable[[str], Golden]) -> None:
    engine, dispatcher = open_engine(golden("olmoe-base"))
    engine.inspect(PROMPTS[:1], InspectionParams(hidden_states=True))
    assert dispatcher.num_exchanges > 0


class Laps:
    """A ``TimingSink`` of all steps."""

    def __init__(self) -> None:
        self.found: list[tuple[str, int, int, int]] = []
        self.took_ns: Counter[str] = Counter()

    def fork(self) -> Laps:
        return self

    def begin_step(self, header: StepHeader) -> bool:
        return True

    def add(self, name: str, start_ns: int, end_ns: int, place: dict[str, Any]) -> None:
        assert start_ns <= end_ns
        self.took_ns[name] += end_ns - start_ns
        self.found.append((name, place.get("layer", -1), place.get("micro_batch", -1), end_ns))

    def flush(self) -> None:
        pass


@pytest.mark.parametrize("variant", ["olmoe-base", "dots1-groups"])
@pytest.mark.parametrize("num_micro_batches", [1, 2])
def test_native_layers_are_timed(
    golden: Callable[[str], Golden], variant: str, num_micro_batches: int
) -> None:
    """The laps of each layer and micro-batch, in the order of time."""
    laps = []
    for kind in (OneByOne, Counting):
        engine, dispatcher = open_engine(golden(variant), kind, num_micro_batches=num_micro_batches)
        dispatcher.timer = StepTimer(sink := Laps())
        engine.generate(PROMPTS, SCORED)
        ends_ns = [end_ns for *_, end_ns in sink.found]
        assert ends_ns == sorted(ends_ns)
        laps.append([place for *place, _ in sink.found])
        assert sink.took_ns["dispatch"] > sink.took_ns["combine"]  # experts compute at once
    assert sorted(laps[1]) == sorted(laps[0])
    assert dispatcher.num_exchanges == 0
