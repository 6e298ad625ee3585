"""Beams in the engine: those of transformers, the same bits however rows are cut, lost or found."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs

from benchmarks.harness.local_engine import LocalEngine, block_bytes
from cluster.config.cluster import EngineSection
from cluster.config.speculation import SpeculationSection
from cluster.core.errors import PeerLostError, RequestError
from tests.fakes import FailingDispatcher, tiny_tensors, write_tiny_checkpoint
from tests.harness.tiers import quick_rows
from tests.reference.beams import (
    CLEAR_MARGIN,
    BeamCase,
    a_few_cases,
    check_beams,
    many_cases,
    transformers_beams,
)
from tests.reference.exact import exact, float_bits
from tests.reference.goldens import ALL_VARIANTS, MAX_MODEL_LEN, Golden
from workers.dispatch.dispatcher import TokenDispatcher
from workers.requests.request import (
    BeamParams,
    EarlyStopping,
    FinishReason,
    Request,
    SamplingParams,
    TokenOutput,
)
from workers.requests.step_header import Grant
from workers.scheduling.scheduler import Scheduler
from workers.scheduling.step_intent import StepIntent

pytestmark = pytest.mark.heavy

OF_EACH_KIND = (
    *("olmoe-base", "dots1-swa", "jetmoe-tied", "gptoss-base", "deepseekv3-base"),
    "qwen3next-base",
)
"""One of each kind of attention; the last has recurrent states."""
FIRST_OF_FAMILY = (
    *(*OF_EACH_KIND, "qwen3moe-base", "glm4moe-base", "mixtral-base"),
    *("minimaxm2-official-like", "ernie45-official-like", "flexolmo-base"),
    *("deepseekv2-lite", "glm4lite-official-like", "qwen35moe-base"),
)
OFTEN_NEAR_A_TIE = ("jetmoe-untied-top3-eps", "minimaxm2-dynamic")
"""Goldens with two results of nearly equal score for half of the searches."""
SEARCH = SamplingParams(
    max_tokens=10,
    temperature=0.0,
    ignore_eos=True,
    stop_token_ids=(7, 11, 30, 31, 32, 33, 50, 51, 52, 53),
    logprobs=2,
    beams=BeamParams(),
)
SECTION = EngineSection(
    block_size_tokens=4, max_num_seqs=8, max_num_batched_tokens=32, deterministic="on"
)


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(name, marks=() if name in OF_EACH_KIND else pytest.mark.slow)
        for name in ALL_VARIANTS
    ],
)
def test_beams_are_those_of_transformers(golden: Callable[[str], Golden], variant: str) -> None:
    """Each alone, and all in one batch."""
    check(golden(variant), a_few_cases(golden(variant)))


@pytest.mark.slow
@pytest.mark.parametrize("variant", FIRST_OF_FAMILY)
def test_beams_of_many_kinds_are_those_of_transformers(
    golden: Callable[[str], Golden], variant: str
) -> None:
    check(golden(variant), many_cases(golden(variant)))


def check(golden: Golden, cases: Sequence[BeamCase]) -> None:
    found = transformers_beams(golden, cases)
    clear = [pair for pair in zip(cases, found, strict=True) if pair[1].margin > CLEAR_MARGIN]
    share = Fraction(1, 2) if golden.name in OFTEN_NEAR_A_TIE else Fraction(2, 3)
    assert len(clear) >= share * len(cases), "most searches have one result"
    assert any(len(beam) < 12 for _, one in clear for beam in one.beams), "no output has ended"
    engine = LocalEngine(golden.path, dtype="float32", max_model_len=MAX_MODEL_LEN)
    requests = [case.request(f"r{place}") for place, (case, _) in enumerate(clear)]
    alone: dict[tuple[str, int], list[TokenOutput]] = {}
    for request in requests:
        alone |= engine.run([request])
    for outputs in (alone, engine.run([structs.replace(r, attempt=1) for r in requests])):
        for request, (case, one) in zip(requests, clear, strict=True):
            check_beams(case, one, [outputs[request.request_id, c][0] for c in range(request.n)])
    assert engine.engine.pool.num_free == engine.engine.pool.num_blocks
    engine.engine.check_integrity()


def requests(count: int = 6, seed: int = 3, **more: object) -> list[Request]:
    """Searches of several widths, and ordinary requests between them."""
    rng = random.Random(seed)
    stops = list(EarlyStopping)
    found = []
    for i in range(count):
        prompt = tuple(rng.randint(3, 95) for _ in range(rng.randint(1, 21)))
        beams = BeamParams(length_penalty=float(i % 3), early_stopping=stops[i % 3])
        params = structs.replace(SEARCH, beams=None if i % 4 == 3 else beams, **more)
        found.append(Request(request_id=f"r{i}", prompt=prompt, n=2 + i % 3, params=params))
    return found


def run(engine: LocalEngine, wanted: Sequence[Request]) -> dict[tuple[str, int], object]:
    """What clients get of each choice, with the accounts checked after each step."""
    for request in wanted:
        engine.add_request(request)
    outputs: dict[tuple[str, int], list[TokenOutput]] = {}
    while engine.engine.has_work:
        for output in engine.step():
            outputs.setdefault((output.request_id, output.choice), []).append(output)
        engine.engine.check_integrity()
    assert engine.engine.pool.num_free == engine.engine.pool.num_blocks
    assert len(outputs) == sum(request.n for request in wanted)
    return {key: bits(found) for key, found in outputs.items()}


def bits(outputs: Sequence[TokenOutput]) -> object:
    score = outputs[-1].score
    return exact(outputs), None if score is None else float_bits(score)


@pytest.fixture(scope="module")
def alone(tiny_checkpoint: Path) -> dict[tuple[str, int], object]:
    """The results of ``requests()``, each served alone."""
    engine = LocalEngine(tiny_checkpoint, section=SECTION)
    found: dict[tuple[str, int], object] = {}
    for request in requests():
        found |= run(engine, [request])
    return found


def with_blocks(path: Path, section: EngineSection, num_blocks: int) -> EngineSection:
    probe = LocalEngine(path)
    each = block_bytes(probe.config, section.block_size_tokens, torch.float32)
    return replace(section, kv_cache_bytes=each * num_blocks)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"enable_prefix_caching": False},
        {"block_size_tokens": 1},
        {"block_size_tokens": 64},
        {"max_num_batched_tokens": 8},
        {"max_num_seqs": 3},
        {"max_num_seqs": 1, "max_num_batched_tokens": 5},
    ],
    ids=str,
)
@pytest.mark.parametrize("num_micro_batches", quick_rows({2}, [1, 2]))
def test_batches_blocks_and_seats_change_nothing(
    tiny_checkpoint: Path,
    alone: dict[tuple[str, int], object],
    change: dict[str, Any],
    num_micro_batches: int,
) -> None:
    section = replace(SECTION, **change)
    engine = LocalEngine(tiny_checkpoint, section=section, num_micro_batches=num_micro_batches)
    assert run(engine, requests()) == alone


@pytest.mark.parametrize("num_blocks", [8, 9, 12, 16])
@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_beams_that_do_not_fit_together_find_the_same(
    tiny_checkpoint: Path,
    alone: dict[tuple[str, int], object],
    num_blocks: int,
    enable_prefix_caching: bool,
) -> None:
    section = replace(SECTION, enable_prefix_caching=enable_prefix_caching)
    section = with_blocks(tiny_checkpoint, section, num_blocks)
    engine = LocalEngine(tiny_checkpoint, section=section)
    assert run(engine, requests()) == alone
    assert engine.engine.stats()["num_preemptions_total"] > 0


def test_searches_of_two_tenants_do_not_hold_what_the_other_needs(tiny_checkpoint: Path) -> None:
    """Each fits alone; the beams of both together do not."""
    prompt = tuple(range(3, 20))
    params = structs.replace(SEARCH, max_tokens=14, stop_token_ids=())
    wanted = [
        Request(request_id=name, prompt=(*prompt, place), params=params, n=4, tenant=name)
        for place, name in enumerate(("a", "b"), 40)
    ]
    section = replace(SECTION, max_num_batched_tokens=9, enable_prefix_caching=False)
    large = LocalEngine(tiny_checkpoint, section=section)
    want = run(large, wanted)
    small = LocalEngine(tiny_checkpoint, section=with_blocks(tiny_checkpoint, section, 17))
    assert run(small, wanted) == want


def failing_engine(path: Path, section: EngineSection) -> tuple[LocalEngine, FailingDispatcher]:
    """An engine, and what makes its steps fail."""
    made: list[FailingDispatcher] = []

    def wrap(inner: TokenDispatcher) -> FailingDispatcher:
        made.append(FailingDispatcher(inner))
        return made[0]

    return LocalEngine(path, section=section, wrap=wrap), made[0]


def step(engine: LocalEngine, outputs: dict[tuple[str, int], list[TokenOutput]]) -> None:
    """Run a step, which may fail, and add what it put out."""
    try:
        new = engine.step()
    except PeerLostError:
        new = []
    for output in new:
        outputs.setdefault((output.request_id, output.choice), []).append(output)
    engine.engine.check_integrity()


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 60))]
)
def test_random_mixes_find_what_each_finds_alone(tiny_checkpoint: Path, seed: int) -> None:
    """Tenants, priorities, aborts and lost peers, in a pool that is too small for all."""
    rng = random.Random(seed)
    section = replace(
        SECTION,
        block_size_tokens=rng.choice([1, 2, 4, 8]),
        max_num_seqs=rng.choice([1, 2, 3, 8]),
        max_num_batched_tokens=rng.choice([8, 12, 40]),
        enable_prefix_caching=rng.random() < 0.7,
    )
    wanted = [
        structs.replace(
            request,
            n=rng.randint(1, 5),
            tenant=rng.choice("ab"),
            priority=rng.choice([0, 0, 1]),
            weight=rng.choice([1.0, 3.0]),
        )
        for request in requests(8, seed)
    ]
    large = LocalEngine(tiny_checkpoint, section=SECTION)
    want: dict[tuple[str, int], object] = {}
    for request in wanted:
        want |= run(large, [request])
    longest = max(len(request.prompt) for request in wanted) + SEARCH.max_tokens
    least = -(-longest // section.block_size_tokens)
    section = with_blocks(tiny_checkpoint, section, least + rng.randint(0, least))
    engine, failing = failing_engine(tiny_checkpoint, section)
    outputs: dict[tuple[str, int], list[TokenOutput]] = {}
    waiting, aborted = list(wanted), set[str]()
    for _ in range(5000):
        if waiting and rng.random() < 0.4:
            engine.add_request(waiting.pop())
        if rng.random() < 0.01:
            (chosen,) = rng.sample(wanted, 1)
            aborted.add(chosen.request_id)
            engine.engine.abort(chosen.request_id)
        failing.fail_at = rng.randint(1, 4) if rng.random() < 0.1 else None
        step(engine, outputs)
        if not waiting and not engine.engine.has_work:
            break
    assert not engine.engine.has_work, "it stands still"
    complete = {k: bits(o) for k, o in outputs.items() if o[-1].finish_reason is not None}
    assert complete == {k: want[k] for k in complete}
    left = {key for key in want if key[0] not in aborted} - complete.keys()
    assert not left
    assert engine.engine.pool.num_free == engine.engine.pool.num_blocks


def test_forks_copy_a_block_and_compute_nothing_again(tiny_checkpoint: Path) -> None:
    engine = LocalEngine(tiny_checkpoint, section=SECTION)
    params = structs.replace(SEARCH, stop_token_ids=())
    prompt = tuple(range(3, 24))
    engine.add_request(Request(request_id="r", prompt=prompt, n=4, params=params))
    rows = list[int]()
    while engine.engine.has_work:
        wanted = engine.engine.rows_wanted()
        rows.append(wanted.decode_rows + wanted.prefill_rows)
        engine.step()
    assert rows == [len(prompt)] + [4] * (params.max_tokens - 1)
    assert engine.engine.stats()["generation_tokens_total"] == 4 * params.max_tokens


def test_blocks_of_beams_that_were_given_up_are_not_kept(tiny_checkpoint: Path) -> None:
    """The request asks to keep its blocks: those of its prompt and of its last beams."""
    engine = LocalEngine(tiny_checkpoint, section=SECTION, clock=lambda: 0.0)
    params = structs.replace(SEARCH, stop_token_ids=(), max_tokens=40)
    prompt = tuple(range(3, 20))
    request = Request(request_id="r", prompt=prompt, n=3, params=params, cache_ttl_s=60.0)
    outputs = engine.run([request])
    texts = {prompt + outputs["r", choice][0].token_ids[:-1] for choice in range(3)}
    kept = {text[: 4 * place] for text in texts for place in range(1, len(text) // 4 + 1)}
    known = sum(
        engine.engine.pool.hash_of(b) is not None for b in range(engine.engine.pool.num_blocks)
    )
    assert engine.engine.stats()["kv_blocks_kept"] == len(kept) < known


@pytest.mark.parametrize("leaves_out", [False, True])
def test_steps_that_fail_change_nothing(
    tiny_checkpoint: Path, alone: dict[tuple[str, int], object], leaves_out: bool
) -> None:
    engine, failing = failing_engine(tiny_checkpoint, SECTION)
    outputs: dict[tuple[str, int], list[TokenOutput]] = {}
    for request in requests():
        engine.add_request(request)
    turns = iter(range(10_000))
    while engine.engine.has_work:
        is_bad = next(turns) % 3 == 1
        failing.leaves_out = is_bad and leaves_out
        failing.fail_at = 2 if is_bad and not leaves_out else None
        step(engine, outputs)
    assert {key: bits(found) for key, found in outputs.items()} == alone
    assert leaves_out or failing.num_failures > 3


def test_a_score_is_that_of_the_tokens_log_probabilities(tiny_checkpoint: Path) -> None:
    engine = LocalEngine(tiny_checkpoint, section=SECTION)
    wanted = [one for one in requests(12) if one.params.beams is not None]
    outputs = engine.run(wanted)
    for request in wanted:
        assert request.params.beams is not None
        scores = []
        for choice in range(request.n):
            (only,) = outputs[request.request_id, choice]
            values = [entry.logprob for entry in only.logprobs]
            length = len(only.token_ids) ** request.params.beams.length_penalty
            assert [entry.token_id for entry in only.logprobs] == list(only.token_ids)
            assert only.score == pytest.approx(math.fsum(values) / length)
            for entry in only.logprobs:
                assert len(entry.top) == 2
                better = [token for token, value in entry.top if value > entry.logprob]
                assert entry.rank == len(better) + 1 if entry.rank <= 2 else len(better) == 2
            assert only.score is not None
            scores.append(only.score)
        assert scores == sorted(scores, reverse=True)
        assert len({outputs[request.request_id, c][0].token_ids for c in range(request.n)}) > 1


def test_log_probabilities_are_those_of_the_same_text_as_a_prompt(tiny_checkpoint: Path) -> None:
    engine = LocalEngine(tiny_checkpoint, section=SECTION)
    (request,) = requests(1)
    beams = engine.run([request])
    for choice in range(request.n):
        (only,) = beams[request.request_id, choice]
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=2)
        (scored,) = engine.generate([request.prompt + only.token_ids], params)
        assert scored.prompt_logprobs is not None
        assert scored.prompt_logprobs[len(request.prompt) :] == only.logprobs


def test_min_tokens_and_the_models_own_end(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path)
    engine = LocalEngine(tmp_path, section=SECTION)
    (eos, *_) = engine.config.eos_token_ids
    params = structs.replace(SEARCH, stop_token_ids=(), min_tokens=4, max_tokens=8)
    prompt = (5, 6, 7)
    kinds: dict[str, dict[str, Any]] = {
        "ignored": {},
        "eos": {"ignore_eos": False},
        "stop": {"stop_token_ids": (eos,)},
    }
    wanted = [
        Request(request_id=name, prompt=prompt, n=6, params=structs.replace(params, **more))
        for name, more in kinds.items()
    ]
    found = engine.run(wanted)
    by_name = {
        r.request_id: [found[r.request_id, choice][0] for choice in range(6)] for r in wanted
    }
    assert all(len(o.token_ids) == 8 for o in by_name["ignored"])
    for eos_output, stop_output in zip(by_name["eos"], by_name["stop"], strict=True):
        assert eos_output.token_ids == stop_output.token_ids
        assert eos not in eos_output.token_ids[:4]
        ends = eos_output.token_ids[-1] == eos
        assert eos_output.finish_reason is (FinishReason.STOP if ends else FinishReason.LENGTH)
        assert (eos_output.stop_token_id, stop_output.stop_token_id) == (
            None,
            eos if ends else None,
        )


def test_drafts_are_not_run_for_beams(
    tiny_checkpoint: Path, alone: dict[tuple[str, int], object]
) -> None:
    speculation = SpeculationSection(speculative_method="ngram", num_speculative_tokens=4)
    engine = LocalEngine(tiny_checkpoint, section=SECTION, speculation=speculation)
    assert run(engine, [r for r in requests() if r.params.beams is not None]) == {
        key: value for key, value in alone.items() if key[0] != "r3"
    }
    assert not engine.engine.stats()["spec_decode_num_drafts_total"]


def test_recurrent_states_are_forked(golden: Callable[[str], Golden]) -> None:
    path = golden("qwen3next-official-like").path
    engine = LocalEngine(path, section=SECTION, max_model_len=MAX_MODEL_LEN)
    each: dict[tuple[str, int], object] = {}
    for request in requests():
        each |= run(engine, [request])
    assert run(engine, requests()) == each
    section = replace(SECTION, enable_prefix_caching=False, max_num_seqs=3)
    assert run(LocalEngine(path, section=section, max_model_len=MAX_MODEL_LEN), requests()) == each


def test_an_aborted_search_frees_all_and_a_choice_of_it_cannot_end(tiny_checkpoint: Path) -> None:
    engine = LocalEngine(tiny_checkpoint, section=SECTION)
    (request,) = requests(1)
    engine.add_request(request)
    for _ in range(4):
        assert not engine.step()
    assert engine.engine.stats()["num_requests_running"] == request.n
    engine.engine.abort(request.request_id, (0,))
    assert request.request_id in engine.engine.requests
    engine.engine.abort(request.request_id)
    engine.engine.check_integrity()
    assert not engine.engine.has_work
    assert engine.engine.pool.num_free == engine.engine.pool.num_blocks


def test_a_late_search_fails_as_a_whole(tiny_checkpoint: Path) -> None:
    now = [0.0]
    engine = LocalEngine(tiny_checkpoint, section=SECTION, clock=lambda: now[0])
    request = structs.replace(requests(1)[0], deadline_ms=1000)
    engine.add_request(request)
    for _ in range(4):
        assert not engine.step()
    now[0] = 1.5
    outputs = engine.step()
    assert [output.choice for output in outputs] == list(range(request.n))
    assert {output.error_code for output in outputs} == {"deadline_exceeded"}
    assert not engine.engine.has_work
    assert engine.engine.stats()["choices_error_total"] == request.n


def test_a_beam_that_is_not_finite_fails_the_search(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    tensors["model.embed_tokens.weight"][3:] = float("nan")
    write_tiny_checkpoint(tmp_path, tensors=tensors)
    engine = LocalEngine(tmp_path, section=SECTION)
    request = Request(request_id="r", prompt=(1, 2), n=3, params=SEARCH)
    outputs = engine.run([request])
    assert [outputs["r", choice][0].error_code for choice in range(3)] == ["internal_error"] * 3
    assert engine.engine.pool.num_free == engine.engine.pool.num_blocks
    engine.engine.check_integrity()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 87}, r"n \(87\) must be at most 85 for beams"),
        ({"output_so_far": ((5,),)}, "output_so_far must be empty for beams"),
        ({"params": structs.replace(SEARCH, max_tokens=0)}, r"max_tokens \(0\) must be at least 1"),
    ],
)
def test_searches_that_cannot_run_are_refused(
    tiny_checkpoint: Path, change: dict[str, object], message: str
) -> None:
    engine = LocalEngine(tiny_checkpoint, section=SECTION)
    request = Request(request_id="r", prompt=(5,), n=2, params=SEARCH)
    with pytest.raises(RequestError, match=message):
        engine.add_request(structs.replace(request, **change))
    assert not engine.engine.has_work


def test_idle_beams_run_no_rows_and_give_way(tiny_checkpoint: Path) -> None:
    """With one seat the beams of a search take turns, and none is computed twice in a step."""
    engine = LocalEngine(tiny_checkpoint, section=replace(SECTION, max_num_seqs=1))
    params = structs.replace(SEARCH, stop_token_ids=(), max_tokens=4)
    engine.add_request(Request(request_id="r", prompt=tuple(range(3, 20)), n=3, params=params))
    seen = Counter[int]()
    plan = Scheduler.plan

    def count(self: Scheduler, intent: StepIntent, grant: Grant) -> object:
        planned = plan(self, intent, grant)
        seen[len(planned.rows)] += 1
        return planned

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scheduler, "plan", count)
        while engine.engine.has_work:
            engine.step()
            engine.engine.check_integrity()
    assert seen == {1: 1 + 3 * 3}
