"""The engine over its local dispatcher: equal results however work is cut, and clean endings."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec import structs
from numpy.typing import NDArray

from benchmarks.harness.local_engine import LocalEngine, block_bytes, generated
from cluster.config.cluster import EngineSection
from cluster.core.errors import (
    ConfigError,
    ContextLengthError,
    PeerLostError,
    QueueFullError,
    RequestError,
)
from tests.fakes import TINY_CONFIG, FailingDispatcher, tiny_tensors, write_tiny_checkpoint
from tests.reference.goldens import MAX_MODEL_LEN, Golden
from workers.requests.request import FinishReason, Request, SamplingParams, TokenOutput
from workers.requests.step_header import Grant, Grants, StepHeader
from workers.requests.traced import StepParents
from workers.scheduling.step_plan import RowsWanted

pytestmark = pytest.mark.heavy

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)


def prompts(count: int, longest: int = 40, seed: int = 0) -> list[tuple[int, ...]]:
    rng = random.Random(seed)
    return [tuple(rng.randint(3, 95) for _ in range(rng.randint(1, longest))) for _ in range(count)]


def section_with_blocks(path: Path, num_blocks: int) -> EngineSection:
    """An engine section whose KV memory holds exactly this number of blocks (float32)."""
    probe = LocalEngine(path)
    section = EngineSection(block_size_tokens=4, max_num_seqs=8)
    each = block_bytes(probe.config, section.block_size_tokens, torch.float32)
    return replace(section, kv_cache_bytes=each * num_blocks)


def tokens(outputs: Sequence[TokenOutput]) -> tuple[int, ...]:
    """Token ids of a choice, checking that indices go on without a gap."""
    found: list[int] = []
    start = outputs[0].index
    for output in outputs:
        assert output.index == start + len(found)
        found += output.token_ids
    return tuple(found)


def load_of(engine: LocalEngine) -> dict[tuple[str, int], NDArray[np.int64]]:
    """Rows routed to each logical expert since the start, by (bank, layer)."""
    return {
        key: counts.prefill + counts.decode
        for key, counts in engine.engine.load.report().banks.items()
    }


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Path) -> list[tuple[int, ...]]:
    """Greedy tokens of ``prompts(8)``, each served alone."""
    engine = LocalEngine(tiny_checkpoint)
    return [engine.generate([p], GREEDY)[0].token_ids for p in prompts(8)]


@pytest.mark.parametrize(
    "section",
    [
        EngineSection(),
        EngineSection(max_num_batched_tokens=8, max_num_seqs=8),
        EngineSection(max_num_seqs=3, block_size_tokens=1),
        EngineSection(block_size_tokens=64, max_num_batched_tokens=70),
    ],
)
@pytest.mark.parametrize("num_micro_batches", [1, 2])
def test_batching_chunking_and_micro_batches_change_nothing(
    tiny_checkpoint: Path,
    reference: list[tuple[int, ...]],
    section: EngineSection,
    num_micro_batches: int,
) -> None:
    engine = LocalEngine(tiny_checkpoint, section=section, num_micro_batches=num_micro_batches)
    results = engine.generate(prompts(8), GREEDY)
    assert [r.token_ids for r in results] == reference
    assert engine.engine.pool.num_free == engine.engine.pool.num_blocks


def test_preemption_changes_nothing(
    tiny_checkpoint: Path, reference: list[tuple[int, ...]]
) -> None:
    section = section_with_blocks(tiny_checkpoint, 16)
    engine = LocalEngine(tiny_checkpoint, section=section)
    results = engine.generate(prompts(8), GREEDY)
    assert [r.token_ids for r in results] == reference
    assert engine.engine.stats()["num_preemptions_total"] > 0
    assert engine.engine.pool.num_free == engine.engine.pool.num_blocks == 16


def test_timings_have_every_chunk_and_preemption(tiny_checkpoint: Path) -> None:
    section = replace(section_with_blocks(tiny_checkpoint, 16), max_num_batched_tokens=8)
    engine = LocalEngine(tiny_checkpoint, section=replace(section, max_num_seqs=8))
    requests = [
        Request(request_id=str(i), prompt=tuple(prompt), params=GREEDY)
        for i, prompt in enumerate(prompts(8))
    ]
    results = engine.run(requests)
    num_preemptions = 0
    for request in requests:
        timings = results[request.request_id, 0][-1].timings
        assert timings is not None
        num_preemptions += len(timings.preempted_s)
        assert len(timings.prefill_s) >= len(request.prompt) / 8
        assert list(timings.prefill_s) == sorted(timings.prefill_s)
        assert timings.prefill_s[-1] <= timings.first_token_s
        assert all(0 <= when <= timings.finished_s for when in timings.preempted_s)
    assert num_preemptions == engine.engine.stats()["num_preemptions_total"] > 0


def test_golden_survives_chunks_and_preemption(golden: Callable[[str], Golden]) -> None:
    expected = golden("olmoe-rope-dynamic")
    probe = LocalEngine(expected.path, max_model_len=MAX_MODEL_LEN)
    section = EngineSection(max_num_batched_tokens=24, max_num_seqs=8)
    each = block_bytes(probe.config, section.block_size_tokens, torch.float32)
    engine = LocalEngine(
        expected.path,
        section=replace(section, kv_cache_bytes=each * 11),
        max_model_len=MAX_MODEL_LEN,
    )
    params = SamplingParams(max_tokens=32, temperature=0.0, ignore_eos=True)
    results = engine.generate(expected.prompts, params)
    assert [r.token_ids for r in results] == [expected.greedy(i) for i in range(8)]
    assert engine.engine.stats()["num_preemptions_total"] > 0


@pytest.mark.parametrize("num_micro_batches", [1, 2])
def test_step_lost_at_any_layer_is_run_again_with_the_same_result(
    tiny_checkpoint: Path, num_micro_batches: int
) -> None:
    each = [
        structs.replace(GREEDY, temperature=1.0, seed=5, frequency_penalty=0.5, logprobs=1),
        structs.replace(GREEDY, temperature=0.8, seed=6, top_p=0.9, repetition_penalty=1.2),
        structs.replace(GREEDY, prompt_logprobs=1),
        GREEDY,
    ]
    section = EngineSection(max_num_batched_tokens=16, max_num_seqs=8, block_size_tokens=4)
    calm = LocalEngine(tiny_checkpoint, section=section, num_micro_batches=num_micro_batches)
    expected = calm.generate(prompts(4), each)
    engine = LocalEngine(
        tiny_checkpoint,
        section=section,
        num_micro_batches=num_micro_batches,
        wrap=FailingDispatcher,
    )
    failing = engine.dispatcher
    assert isinstance(failing, FailingDispatcher)
    rng = random.Random(3)
    requests = [
        Request(request_id=f"r{i}", prompt=p, params=params)
        for i, (p, params) in enumerate(zip(prompts(4), each, strict=True))
    ]
    outputs: dict[str, list[TokenOutput]] = {r.request_id: [] for r in requests}
    for request in requests:
        engine.engine.add_request(request)
    while engine.engine.has_work:
        failing.fail_at = rng.choice((None, *range(4 * num_micro_batches)))
        before = (engine.engine.stats(), engine.engine.rows_wanted())
        try:
            for output in engine.step():
                outputs[output.request_id].append(output)
        except PeerLostError:
            before[0]["steps_abandoned_total"] += 1
            assert (engine.engine.stats(), engine.engine.rows_wanted()) == before
        engine.engine.check_integrity()
    assert failing.num_failures > 5
    for result, (name, found) in zip(expected, outputs.items(), strict=True):
        assert tokens(found) == result.token_ids, name
        assert generated(found).prompt_logprobs == result.prompt_logprobs
        assert tuple(p for o in found for p in o.logprobs) == result.logprobs
    load, calm_load = load_of(engine), load_of(calm)
    assert all((load[key] == calm_load[key]).all() for key in calm_load)


def test_step_that_left_rows_out_is_run_again_with_the_same_result(tiny_checkpoint: Path) -> None:
    params = structs.replace(GREEDY, temperature=1.0, seed=5, frequency_penalty=0.5, logprobs=1)
    section = EngineSection(max_num_batched_tokens=16, max_num_seqs=8, block_size_tokens=4)
    expected = LocalEngine(tiny_checkpoint, section=section).generate(prompts(4), [params] * 4)
    engine = LocalEngine(tiny_checkpoint, section=section, wrap=FailingDispatcher)
    dispatcher = engine.dispatcher
    assert isinstance(dispatcher, FailingDispatcher)
    outputs: list[list[TokenOutput]] = [[] for _ in expected]
    for i, prompt in enumerate(prompts(4)):
        engine.engine.add_request(Request(request_id=f"{i}", prompt=prompt, params=params))
    num_repeated = 0
    for is_short in itertools.cycle([True, False, True, True, False, False]):
        if not engine.engine.has_work:
            break
        dispatcher.leaves_out = is_short
        found = engine.step()
        assert not (is_short and found)
        for output in found:
            outputs[int(output.request_id)].append(output)
        num_repeated += is_short
        engine.engine.check_integrity()
    assert engine.engine.stats()["steps_repeated_total"] == num_repeated > 5
    assert engine.engine.stats()["steps_abandoned_total"] == 0
    for result, own in zip(expected, outputs, strict=True):
        assert tokens(own) == result.token_ids
        assert tuple(p for o in own for p in o.logprobs) == result.logprobs


def test_granted_rows_that_are_gone_still_take_part(tiny_checkpoint: Path) -> None:
    """An abort between proposal and header: peers wait for this rank's exchanges all the same."""
    engine = LocalEngine(tiny_checkpoint, wrap=FailingDispatcher)
    counting = engine.dispatcher
    assert isinstance(counting, FailingDispatcher)
    grant = Grant(decode_rows=0, prefill_rows=3)
    header = StepHeader(
        generation=1, step=1, epoch=1, oldest_epoch=1, grants=Grants.of({0: grant}), exact=True
    )
    assert engine.engine.step(header) == []
    assert counting.num_calls == 2 * 2 + 1  # dispatch and combine of two layers, and the end
    assert engine.step() == []  # nothing granted: no exchange
    assert counting.num_calls == 5


def test_micro_batch_without_rows_takes_part(tiny_checkpoint: Path) -> None:
    """Five rows granted, two there: both are in the first micro-batch."""
    engine = LocalEngine(tiny_checkpoint, wrap=FailingDispatcher)
    counting = engine.dispatcher
    assert isinstance(counting, FailingDispatcher)
    alone = LocalEngine(tiny_checkpoint).generate([(5, 6)], GREEDY)[0].token_ids
    engine.engine.add_request(Request(request_id="a", prompt=(5, 6), params=GREEDY))
    header = StepHeader(
        generation=1,
        step=1,
        epoch=1,
        oldest_epoch=1,
        grants=Grants.of({0: Grant(decode_rows=0, prefill_rows=5)}),
        num_micro_batches=2,
        exact=True,
    )
    (output,) = engine.engine.step(header)
    assert output.token_ids == alone[:1]
    assert counting.num_calls == 2 * 2 * 2 + 1, "the end of the step too"


def test_choices_differ_only_by_their_randomness(tiny_checkpoint: Path) -> None:
    engine = LocalEngine(tiny_checkpoint, section=EngineSection(block_size_tokens=4))
    params = SamplingParams(max_tokens=10, temperature=4.0, seed=4, ignore_eos=True)
    prompt = prompts(1, seed=9)[0] * 3
    outputs = engine.run([Request(request_id="a", prompt=prompt, params=params, n=4)])
    found = [tokens(outputs["a", choice]) for choice in range(4)]
    assert len(set(found)) == 4
    again = engine.run([Request(request_id="b", prompt=prompt, params=params, n=4)])
    assert [tokens(again["b", choice]) for choice in range(4)] == found
    greedy = engine.run([Request(request_id="c", prompt=prompt, params=GREEDY, n=3)])
    assert len({tokens(greedy["c", choice]) for choice in range(3)}) == 1
    engine.engine.check_integrity()
    assert engine.engine.pool.num_free == engine.engine.pool.num_blocks


def test_resubmission_goes_on_where_the_output_ended(tiny_checkpoint: Path) -> None:
    engine = LocalEngine(tiny_checkpoint)
    params = SamplingParams(
        max_tokens=12, temperature=0.9, seed=8, presence_penalty=0.4, ignore_eos=True
    )
    prompt = prompts(1)[0]
    whole = engine.run([Request(request_id="a", prompt=prompt, params=params, n=2)])
    expected = [tokens(whole["a", choice]) for choice in range(2)]
    for cut in (0, 1, 5, 11):
        request = Request(
            request_id=f"b{cut}",
            prompt=prompt,
            params=params,
            n=2,
            attempt=1,
            output_so_far=(expected[0][:cut], expected[1][:3]),
        )
        again = engine.run([request])
        assert again[request.request_id, 0][0].index == cut
        assert tokens(again[request.request_id, 0]) == expected[0][cut:]
        assert tokens(again[request.request_id, 1]) == expected[1][3:]
        assert all(o.attempt == 1 for o in again[request.request_id, 0])


def test_resubmission_of_a_complete_choice_only_ends_it(tiny_checkpoint: Path) -> None:
    engine = LocalEngine(tiny_checkpoint)
    done = tuple(range(10, 22))
    request = Request(
        request_id="a", prompt=(5, 6), params=GREEDY, n=2, output_so_far=(done, done[:4])
    )
    outputs = engine.run([request])
    (last,) = outputs["a", 0]
    assert (last.token_ids, last.finish_reason) == ((), FinishReason.LENGTH)
    assert last.index == 12
    assert len(tokens(outputs["a", 1])) == 8


def test_closed_choices_do_not_run_again(tiny_checkpoint: Path) -> None:
    params = structs.replace(GREEDY, temperature=1.0, prompt_logprobs=0)
    request = Request(request_id="a", prompt=tuple(range(5, 45)), params=params, n=3)
    whole = LocalEngine(tiny_checkpoint).run([request])
    engine = LocalEngine(tiny_checkpoint)
    so_far = tuple(tokens(whole["a", choice])[:3] for choice in range(3))
    again = structs.replace(request, attempt=1, output_so_far=so_far, closed_choices=(0,))
    outputs = engine.run([again])
    assert not outputs.get(("a", 0))
    for choice in (1, 2):
        assert tokens(outputs["a", choice]) == tokens(whole["a", choice])[3:]
        assert outputs["a", choice][0].prompt_logprobs is None
    engine.engine.check_integrity()
    assert engine.engine.pool.num_free == engine.engine.pool.num_blocks


def test_newer_attempt_replaces_the_older(tiny_checkpoint: Path) -> None:
    engine = LocalEngine(tiny_checkpoint)
    request = Request(request_id="a", prompt=(5, 6, 7), params=GREEDY)
    engine.engine.add_request(request)
    engine.step()
    with pytest.raises(RequestError, match="already here"):
        engine.engine.add_request(request)
    outputs = engine.run([structs.replace(request, attempt=1)])
    assert {o.attempt for o in outputs["a", 0]} == {1}
    assert len(tokens(outputs["a", 0])) == 12


def test_scoring_only_ends_without_a_token(tiny_checkpoint: Path) -> None:
    engine = LocalEngine(tiny_checkpoint)
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    result = engine.generate([(5, 6, 7)], params)[0]
    assert result.token_ids == ()
    assert result.finish_reason is FinishReason.LENGTH
    assert result.prompt_logprobs is not None
    assert len(result.prompt_logprobs) == 3
    assert engine.engine.pool.num_free == engine.engine.pool.num_blocks


def test_stop_tokens_eos_and_min_tokens(tiny_checkpoint: Path) -> None:
    engine = LocalEngine(tiny_checkpoint)
    prompt = prompts(1)[0]
    plain = engine.generate([prompt], GREEDY)[0].token_ids
    stop = plain[3]
    first = plain.index(stop)
    params = structs.replace(GREEDY, stop_token_ids=(stop,))
    (found,) = engine.run([Request(request_id="a", prompt=prompt, params=params)]).values()
    assert tokens(found) == plain[: first + 1]
    assert (found[-1].finish_reason, found[-1].stop_token_id) == (FinishReason.STOP, stop)
    held = engine.generate([prompt], structs.replace(params, min_tokens=8))[0].token_ids
    assert len(held) >= 8
    assert stop not in held[:8]


def test_deadline_ends_a_request_with_its_own_code(tiny_checkpoint: Path) -> None:
    now = [100.0]
    engine = LocalEngine(tiny_checkpoint, clock=lambda: now[0])
    engine.engine.add_request(
        Request(request_id="a", prompt=(5, 6), params=GREEDY, deadline_ms=1500)
    )
    assert engine.step()[0].finish_reason is None
    now[0] = 101.5
    (last,) = engine.engine.poll()
    assert (last.finish_reason, last.error_code) == (FinishReason.ERROR, "deadline_exceeded")
    assert last.error == "the request's deadline has passed"  # not how much of it was left here
    assert last.index == 1
    assert last.timings is not None
    assert last.timings.finished_s == pytest.approx(1.5)
    assert not engine.engine.has_work
    assert engine.engine.pool.num_free == engine.engine.pool.num_blocks


def test_abort_of_one_choice_and_of_all(tiny_checkpoint: Path) -> None:
    engine = LocalEngine(tiny_checkpoint)
    engine.engine.add_request(Request(request_id="a", prompt=(5, 6, 7), params=GREEDY, n=3))
    engine.step()
    engine.step()
    engine.engine.abort("a", [1])
    assert {o.choice for o in engine.step()} == {0, 2}
    engine.engine.abort("a")
    engine.engine.abort("unknown")
    assert not engine.engine.has_work
    assert engine.engine.pool.num_free == engine.engine.pool.num_blocks
    assert engine.engine.stats()["choices_abort_total"] == 3


def test_a_paused_request_stands_still_and_goes_on(tiny_checkpoint: Path) -> None:
    engine = LocalEngine(tiny_checkpoint)
    request = Request(request_id="a", prompt=(5, 6, 7), params=GREEDY, n=2)
    expected = engine.run([request])
    engine.engine.add_request(request)
    engine.engine.add_request(structs.replace(request, request_id="b", n=1))
    first = engine.step()
    engine.engine.requests.pause("a", 3 + 3)
    engine.engine.requests.pause("unknown")
    first += engine.step()
    assert engine.engine.requests.take_paused() == [], "5 tokens"
    first += engine.step()
    assert engine.engine.requests.take_paused() == ["a"]
    assert engine.engine.requests.take_paused() == []
    assert {o.request_id for o in engine.step()} == {"b"}
    engine.engine.abort("b")
    assert engine.engine.rows_wanted() == RowsWanted(decode_rows=0, prefill_rows=0)
    assert engine.engine.has_work
    engine.engine.requests.resume("a")
    found = [o for o in first if o.request_id == "a"]
    while engine.engine.has_work:
        found += engine.step()
    for choice in range(2):
        outputs = [o for o in found if o.choice == choice]
        assert tokens(outputs) == tokens(expected["a", choice])


@pytest.mark.parametrize("so_far", [(), ((1, 2), (3,))])
def test_a_request_that_is_handed_over_pauses_after_one_token(
    tiny_checkpoint: Path, so_far: tuple[tuple[int, ...], ...]
) -> None:
    engine, requests = LocalEngine(tiny_checkpoint), list[str]()
    asked = Request(request_id="a", prompt=(5,) * 40, params=GREEDY, n=2, pauses=True)
    engine.engine.add_request(structs.replace(asked, output_so_far=so_far))
    outputs = []
    while not requests:
        outputs += engine.step()
        requests = engine.engine.requests.take_paused()
    assert sum(len(output.token_ids) for output in outputs if output.choice == 1) == 1
    assert engine.engine.requests.paused == {"a"}
    assert [len(keys) for keys in engine.engine.requests.block_hashes("a")] == [2, 2]
    assert engine.engine.rows_wanted() == RowsWanted(decode_rows=0, prefill_rows=0)


def test_a_newer_attempt_is_not_paused(tiny_checkpoint: Path) -> None:
    engine = LocalEngine(tiny_checkpoint)
    request = Request(request_id="a", prompt=(5, 6, 7), params=GREEDY)
    engine.engine.add_request(request)
    engine.engine.requests.pause("a")
    assert engine.engine.requests.take_paused() == ["a"]
    engine.engine.requests.pause("a")
    outputs = engine.run([structs.replace(request, attempt=1)])
    assert engine.engine.requests.take_paused() == []
    assert len(tokens(outputs["a", 0])) == 12


def test_a_request_that_may_run_alone_is_not_paused(tiny_checkpoint: Path) -> None:
    engine = LocalEngine(tiny_checkpoint)
    request = Request(request_id="a", prompt=(5, 6, 7), params=GREEDY, num_deaths=2)
    engine.engine.add_request(request)
    engine.engine.requests.pause("a")
    assert engine.engine.requests.take_paused() == []


def test_not_a_number_fails_that_request_alone(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    tensors["model.embed_tokens.weight"][95] = float("nan")
    write_tiny_checkpoint(tmp_path, TINY_CONFIG, tensors)
    engine = LocalEngine(tmp_path, section=EngineSection(block_size_tokens=4))
    healthy = (*prompts(1, seed=5)[0][:20], 6)
    healthy = tuple(t if t != 95 else 94 for t in healthy)
    expected = engine.generate([healthy], GREEDY)[0].token_ids
    bad = Request(request_id="bad", prompt=(5, 95, *range(10, 40)), params=GREEDY, n=2)
    good = Request(request_id="good", prompt=healthy, params=GREEDY)
    outputs = engine.run([bad, good])
    for choice in range(2):
        (last,) = outputs["bad", choice]
        assert last.finish_reason is FinishReason.ERROR
        assert last.error_code == "internal_error"
        assert "not finite" in (last.error or "")
    assert tokens(outputs["good", 0]) == expected
    for layer in engine.engine.cache.layers:
        assert torch.isfinite(layer).all(), "no trace is left for the next holder of a block"
    assert engine.generate([healthy], GREEDY)[0].token_ids == expected


@pytest.mark.parametrize(
    ("request_", "error", "words"),
    [
        (Request(request_id="a", prompt=(), params=GREEDY), RequestError, "prompt must not be"),
        (Request(request_id="a", prompt=(96,), params=GREEDY), RequestError, "prompt has token id"),
        (Request(request_id="a", prompt=(-1,), params=GREEDY), RequestError, "ids must be 0 to 95"),
        (Request(request_id="a", prompt=(5,), params=GREEDY, n=0), RequestError, r"n \(0\)"),
        (
            Request(request_id="a", prompt=(5,), params=SamplingParams(max_tokens=-1)),
            RequestError,
            "must not be negative",
        ),
        (
            Request(request_id="a", prompt=(5,) * 250, params=GREEDY),
            ContextLengthError,
            "maximum context length is 256 tokens, but the prompt has 250 and max_tokens is 12",
        ),
        (
            Request(request_id="a", prompt=(5,) * 100, params=GREEDY),
            ContextLengthError,
            "need 28 KV blocks of 4 tokens, this worker has 20",
        ),
        (
            Request(
                request_id="a",
                prompt=(5,),
                params=structs.replace(GREEDY, logit_bias=((200, 1.0),)),
            ),
            RequestError,
            "logit_bias has token id 200",
        ),
        (
            Request(request_id="a", prompt=(5,), params=GREEDY, output_so_far=((), ())),
            RequestError,
            "output_so_far has 2 choices",
        ),
        (
            Request(request_id="a", prompt=(5,), params=GREEDY, n=2, closed_choices=(0, 1)),
            RequestError,
            "must be some of the 2 choices, not all",
        ),
    ],
)
def test_what_can_never_run_is_refused_at_once(
    tiny_checkpoint: Path, request_: Request, error: type[RequestError], words: str
) -> None:
    engine = LocalEngine(tiny_checkpoint, section=section_with_blocks(tiny_checkpoint, 20))
    with pytest.raises(error, match=words):
        engine.engine.add_request(request_)
    assert not engine.engine.has_work
    assert engine.engine.pool.num_free == 20


def test_full_queue_refuses_more(tiny_checkpoint: Path) -> None:
    engine = LocalEngine(tiny_checkpoint, section=EngineSection(max_waiting=2))
    for i in range(2):
        engine.engine.add_request(Request(request_id=str(i), prompt=(5,), params=GREEDY))
    with pytest.raises(
        QueueFullError, match=r"2 sequences are waiting, at most 2 \(max_waiting\) may"
    ):
        engine.engine.add_request(Request(request_id="2", prompt=(5,), params=GREEDY))
    moved = Request(request_id="3", prompt=(5,), params=GREEDY, attempt=1)
    engine.engine.add_request(moved)  # it was let in once
    assert "3" in engine.engine.requests


def test_prompt_tokens_that_wait_are_limited(tiny_checkpoint: Path) -> None:
    engine = LocalEngine(tiny_checkpoint, section=EngineSection(max_waiting_tokens=10)).engine
    engine.add_request(Request(request_id="a", prompt=(5,) * 12, params=GREEDY, n=4))
    with pytest.raises(QueueFullError, match=r"12 prompt tokens are waiting, at most 10 \(max_w"):
        engine.add_request(Request(request_id="b", prompt=(5,), params=GREEDY))
    engine.abort("a")
    for name in "cd":
        engine.add_request(Request(request_id=name, prompt=(5,) * 5, params=GREEDY))
    with pytest.raises(QueueFullError):
        engine.add_request(Request(request_id="e", prompt=(5,), params=GREEDY))


def test_kv_memory_below_one_block_is_refused(tiny_checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="must hold at least one block"):
        LocalEngine(tiny_checkpoint, section=EngineSection(kv_cache_bytes=10))


def test_numbers_and_timings(tiny_checkpoint: Path) -> None:
    engine = LocalEngine(tiny_checkpoint)
    (found,) = engine.run([Request(request_id="a", prompt=(5, 6, 7), params=GREEDY)]).values()
    timings = found[-1].timings
    assert timings is not None
    assert 0 < timings.first_dispatch_s <= timings.first_token_s < timings.finished_s
    assert timings.prefill_s == (timings.first_dispatch_s,)
    assert found[0].timings is not None
    assert found[0].timings.first_token_s == timings.first_token_s
    assert all(o.timings is None for o in found[1:-1])
    stats = engine.engine.stats()
    assert stats["prompt_tokens_total"] == 3
    assert stats["generation_tokens_total"] == 12
    assert stats["steps_total"] == 12
    assert stats["choices_length_total"] == 1
    assert stats['iteration_tokens_total_bucket{le="1"}'] == 11
    assert stats['iteration_tokens_total_bucket{le="8"}'] == stats["iteration_tokens_total_count"]
    assert stats["iteration_tokens_total_sum"] == 3 + 11
    assert stats["kv_cache_usage_perc"] == 0
    assert stats["kv_blocks_free"] == stats["kv_blocks_total"] == engine.engine.pool.num_blocks
    load = load_of(engine)
    assert set(load) == {("mlp", 0), ("mlp", 1)}
    assert all(counts.sum() == (3 + 11) * 2 for counts in load.values())


def test_waiting_for_room_and_for_the_prompt_are_counted_apart(tiny_checkpoint: Path) -> None:
    section = EngineSection(block_size_tokens=4, max_num_seqs=1)
    engine = LocalEngine(tiny_checkpoint, section=section).engine
    engine.add_request(Request(request_id="a", prompt=(5,) * 9, params=GREEDY))
    engine.add_request(Request(request_id="b", prompt=(6,) * 9, params=GREEDY, n=3))
    stats = engine.stats()
    assert stats["num_requests_waiting"] == 4
    assert stats['num_requests_waiting_by_reason{reason="capacity"}'] == 2
    assert stats['num_requests_waiting_by_reason{reason="deferred"}'] == 2


def test_priority_goes_first(tiny_checkpoint: Path) -> None:
    engine = LocalEngine(tiny_checkpoint, section=EngineSection(max_num_seqs=1))
    engine.engine.add_request(Request(request_id="low", prompt=(5,), params=GREEDY, priority=3))
    engine.engine.add_request(Request(request_id="high", prompt=(5,), params=GREEDY, priority=1))
    assert engine.step()[0].request_id == "high"


def test_an_engine_asks_for_spans_of_steps_of_traced_requests(tiny_checkpoint: Path) -> None:
    parents = StepParents(prefill=b"p" * 24, decode=b"d" * 24)
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    traced = Request(request_id="a", prompt=(1, 2, 3), params=params, step_parents=parents)
    engine = LocalEngine(tiny_checkpoint).engine
    engine.add_request(traced)
    engine.add_request(Request(request_id="b", prompt=(1, 2), params=params))
    asked = []
    while engine.has_work:
        wanted = engine.rows_wanted()
        asked.append(wanted.parents)
        grant = Grant(decode_rows=wanted.decode_rows, prefill_rows=wanted.prefill_rows)
        header = StepHeader(
            generation=1,
            step=len(asked),
            epoch=1,
            oldest_epoch=1,
            grants=Grants.of({0: grant}),
            parents=((0, wanted.parents),) if wanted.parents else (),
        )
        engine.step(header)
    prefill, decode = (parents.prefill,), (parents.decode,)
    assert asked == [prefill, decode, decode, (), decode, ()]
