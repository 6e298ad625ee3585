"""The engine with its prefix cache: the same tokens as without it, and less to compute."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from msgspec import structs

from benchmarks.harness.local_engine import LocalEngine
from cluster.config.cluster import EngineSection
from cluster.core.errors import PeerLostError
from tests.fakes import TINY_CONFIG, FailingDispatcher, tiny_tensors, write_tiny_checkpoint
from tests.reference.goldens import MAX_MODEL_LEN, Golden
from tests.workers.engine.test_engine import GREEDY, prompts, section_with_blocks, tokens
from tests.workers.kv.hashes import hashes_of
from workers.engine.engine import Engine
from workers.requests.block_hash import block_hashes
from workers.requests.request import FinishReason, Request, SamplingParams, TokenOutput

pytestmark = pytest.mark.heavy

ON = EngineSection(block_size_tokens=4)
OFF = replace(ON, enable_prefix_caching=False)
SYSTEM = tuple(random.Random(1).choices(range(3, 95), k=33))
"""What most prompts begin with: eight blocks and a token."""


def families(count: int) -> list[tuple[int, ...]]:
    """Prompts of which each begins with a part of ``SYSTEM``."""
    return [SYSTEM[: 33 - i] + p for i, p in enumerate(prompts(count, longest=12, seed=4))]


def requests(name: str, params: SamplingParams = GREEDY, **more: object) -> list[Request]:
    """One request for each of ``families(6)``."""
    return [
        Request(request_id=f"{name}{i}", prompt=p, params=params, **more)  # type: ignore[arg-type]
        for i, p in enumerate(families(6))
    ]


def run(engine: LocalEngine, wanted: Sequence[Request]) -> list[tuple[int, ...]]:
    """Tokens of every choice, with the accounts checked after each step."""
    for request in wanted:
        engine.engine.add_request(request)
    found: dict[tuple[str, int], list[TokenOutput]] = {
        (r.request_id, choice): [] for r in wanted for choice in range(r.n)
    }
    while engine.engine.has_work:
        for output in engine.step():
            found[output.request_id, output.choice].append(output)
        engine.engine.check_integrity()
    return [tokens(outputs) for outputs in found.values()]


def test_tokens_are_the_same_with_and_without(tiny_checkpoint: Path) -> None:
    without = LocalEngine(tiny_checkpoint, section=OFF)
    expected = run(without, requests("a"))
    assert without.engine.stats()["prefix_cache_queries_total"] == 0
    engine = LocalEngine(tiny_checkpoint, section=ON)
    assert run(engine, requests("a")) == expected
    before = engine.engine.stats()
    assert run(engine, requests("b")) == expected
    stats = engine.engine.stats()
    num_tokens = sum(map(len, families(6)))
    assert stats["prefix_cache_queries_total"] == 2 * num_tokens
    hits = stats["prefix_cache_hits_total"] - before["prefix_cache_hits_total"]
    assert hits == sum((len(p) - 1) // 4 * 4 for p in families(6))
    assert stats["prompt_tokens_cached_total"] == stats["prefix_cache_hits_total"]
    assert stats["prompt_tokens_total"] == 2 * num_tokens
    assert stats["kv_cache_usage_perc"] == 0
    assert engine.engine.pool.num_free == engine.engine.pool.num_blocks


def test_golden_tokens_come_from_cached_prompts_and_outputs(
    golden: Callable[[str], Golden],
) -> None:
    expected = golden("olmoe-base")
    engine = LocalEngine(expected.path, section=ON, max_model_len=MAX_MODEL_LEN)
    for cut in (0, 8, 32):  # the second and third prompts hold what the first run produced
        params = structs.replace(GREEDY, max_tokens=32 - cut or 1)
        longer = [p + expected.greedy(i)[:cut] for i, p in enumerate(expected.prompts)]
        found = engine.generate(longer, params)
        for i, result in enumerate(found if cut < 32 else ()):
            assert result.token_ids == expected.greedy(i)[cut:]
    hits = sum((len(p) + cut - 1) // 4 * 4 for p in expected.prompts for cut in (8, 32))
    assert engine.engine.stats()["prefix_cache_hits_total"] == hits


def test_choices_draw_the_same_from_a_cached_prompt(tiny_checkpoint: Path) -> None:
    params = SamplingParams(max_tokens=6, temperature=2.0, seed=3, ignore_eos=True)
    expected = run(LocalEngine(tiny_checkpoint, section=OFF), requests("a", params, n=3))
    engine = LocalEngine(tiny_checkpoint, section=ON)
    assert run(engine, requests("a", params, n=3)) == expected
    assert run(engine, requests("b", params, n=3)) == expected


def test_outputs_report_what_was_cached(tiny_checkpoint: Path) -> None:
    engine = LocalEngine(tiny_checkpoint, section=ON)
    for name, found in (("a", (0, 32)), ("b", (32, 32))):
        wanted = Request(request_id=name, prompt=SYSTEM, params=GREEDY, n=2)
        outputs = engine.run([wanted])
        for choice in range(2):
            first, *others = outputs[name, choice]
            assert first.num_cached_tokens == found[choice]
            assert all(o.num_cached_tokens is None for o in others)
    off = LocalEngine(tiny_checkpoint, section=OFF)
    outputs = off.run([Request(request_id="a", prompt=SYSTEM, params=GREEDY, n=2)])
    assert [outputs["a", choice][0].num_cached_tokens for choice in range(2)] == [0, 0]


def test_salts_keep_requests_apart(tiny_checkpoint: Path) -> None:
    engine = LocalEngine(tiny_checkpoint, section=ON)
    for name, salt, cached in (("a", "x", 0), ("b", "y", 0), ("c", "", 0), ("d", "y", 32)):
        wanted = Request(request_id=name, prompt=SYSTEM, params=GREEDY, cache_salt=salt)
        assert engine.run([wanted])[name, 0][0].num_cached_tokens == cached


def test_a_preempted_sequence_continues_from_cached_blocks(tiny_checkpoint: Path) -> None:
    expected = run(LocalEngine(tiny_checkpoint, section=OFF), requests("a"))
    computed = {}
    for is_on in (True, False):
        section = replace(section_with_blocks(tiny_checkpoint, 20), enable_prefix_caching=is_on)
        engine = LocalEngine(tiny_checkpoint, section=section)
        assert run(engine, requests("a")) == expected
        assert engine.engine.stats()["num_preemptions_total"] > 0
        computed[is_on] = sum(
            (counts.prefill + counts.decode).sum()
            for counts in engine.engine.load.report().banks.values()
        )
    assert computed[True] < computed[False]


def test_prompt_logprobs_are_whole_on_a_cached_prompt(tiny_checkpoint: Path) -> None:
    params = structs.replace(GREEDY, prompt_logprobs=1)
    engine = LocalEngine(tiny_checkpoint, section=ON)
    expected = engine.generate([SYSTEM], params)[0].prompt_logprobs
    found = engine.generate([SYSTEM], params)[0].prompt_logprobs
    assert found == expected
    assert found is not None
    assert len(found) == len(SYSTEM)


def state(engine: Engine) -> tuple[set[bytes], int, dict[str, float]]:
    """What a step that is given up must not change: all but the count of such steps."""
    stats = engine.stats()
    del stats["steps_abandoned_total"]
    return hashes_of(engine.pool), engine.pool.num_free, stats


def test_a_lost_step_leaves_the_cache_as_it_was(tiny_checkpoint: Path) -> None:
    expected = run(LocalEngine(tiny_checkpoint, section=OFF), requests("a"))
    engine = LocalEngine(tiny_checkpoint, section=ON, wrap=FailingDispatcher)
    failing = engine.dispatcher
    assert isinstance(failing, FailingDispatcher)
    run(engine, requests("a")[:1])
    rng = random.Random(5)
    outputs: dict[str, list[TokenOutput]] = {f"b{i}": [] for i in range(6)}
    for request in requests("b"):
        engine.engine.add_request(request)
    while engine.engine.has_work:
        failing.fail_at = rng.choice((None, *range(4)))
        before = state(engine.engine)
        try:
            for output in engine.step():
                outputs[output.request_id].append(output)
        except PeerLostError:
            assert state(engine.engine) == before
        engine.engine.check_integrity()
    assert failing.num_failures > 5
    assert [tokens(found) for found in outputs.values()] == expected


def test_blocks_with_not_a_number_never_enter_the_cache(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    tensors["model.embed_tokens.weight"][95] = float("nan")
    write_tiny_checkpoint(tmp_path, TINY_CONFIG, tensors)
    section = replace(ON, max_num_batched_tokens=16, max_num_seqs=8)
    healthy = (*SYSTEM, *range(10, 20))
    expected = LocalEngine(tmp_path, section=section).generate([healthy], GREEDY)[0].token_ids
    engine = LocalEngine(tmp_path, section=section)
    bad = Request(request_id="bad", prompt=(*SYSTEM, 95, *range(10, 20)), params=GREEDY, n=2)
    outputs = run_to_the_end(engine, bad)
    assert {o.finish_reason for o in outputs} == {FinishReason.ERROR}
    assert not hashes_of(engine.engine.pool)
    assert engine.generate([healthy], GREEDY)[0].token_ids == expected
    # Of a request that fails on top of what another computed nothing is kept either
    assert {o.finish_reason for o in run_to_the_end(engine, structs.replace(bad, attempt=1))} == {
        FinishReason.ERROR
    }
    assert engine.generate([healthy], GREEDY)[0].token_ids == expected
    engine.engine.check_integrity()


def test_a_request_that_fails_by_its_own_fault_costs_no_other_the_cache(
    tiny_checkpoint: Path,
) -> None:
    engine = LocalEngine(tiny_checkpoint, section=ON)
    engine.generate([SYSTEM], GREEDY)
    impossible = structs.replace(GREEDY, allowed_token_ids=(7,), bad_words=((7,),))
    (failed,) = run_to_the_end(
        engine, Request(request_id="bad", prompt=(*SYSTEM, 9), params=impossible)
    )
    assert failed.finish_reason is FinishReason.ERROR
    outputs = engine.run([Request(request_id="good", prompt=SYSTEM, params=GREEDY)])
    assert outputs["good", 0][0].num_cached_tokens == 32


@pytest.mark.parametrize(
    "seed", [*range(2), *(pytest.param(i, marks=pytest.mark.slow) for i in range(2, 30))]
)
def test_random_lives_are_the_same_with_and_without(tiny_checkpoint: Path, seed: int) -> None:
    """Staggered arrivals, few blocks, choices, sampling, scoring, salts, lost steps."""
    rng = random.Random(seed)
    base = replace(
        section_with_blocks(tiny_checkpoint, rng.choice((24, 48))),
        max_num_batched_tokens=rng.choice((16, 64)),
    )
    wanted = [_any_request(rng, i) for i in range(24)]
    runs = []
    for is_on in (True, False):
        engine = LocalEngine(
            tiny_checkpoint,
            section=replace(base, enable_prefix_caching=is_on),
            num_micro_batches=rng.choice((1, 2)),
            wrap=FailingDispatcher,
        )
        runs.append(_live(engine, wanted, random.Random(seed)))
        hits = engine.engine.stats()["prefix_cache_hits_total"]
        assert bool(hits) is is_on
    with_cache, without = runs
    for key, outputs in with_cache.items():
        assert tokens(outputs) == tokens(without[key])
        assert outputs[-1].finish_reason is without[key][-1].finish_reason
        scores = [run[key][0].prompt_logprobs for run in runs]
        assert (scores[0] is None) is (scores[1] is None)
        assert len({len(s.entries()) for s in scores if s is not None}) <= 1


def _any_request(rng: random.Random, number: int) -> Request:
    prompt = SYSTEM[: rng.randint(4, 33)] + tuple(rng.choices(range(3, 95), k=rng.randint(1, 9)))
    params = SamplingParams(
        max_tokens=rng.randint(1, 14),
        temperature=rng.choice((0.0, 0.0, 1.0)),
        seed=number,
        frequency_penalty=rng.choice((0.0, 0.5)),
        prompt_logprobs=rng.choice((None, None, None, 1)),
        ignore_eos=True,
    )
    return Request(
        request_id=f"r{number}",
        prompt=prompt,
        params=params,
        n=rng.choice((1, 1, 3)),
        priority=rng.randint(0, 1),
        cache_salt=rng.choice(("", "", "a")),
    )


def _live(
    engine: LocalEngine, wanted: Sequence[Request], rng: random.Random
) -> dict[tuple[str, int], list[TokenOutput]]:
    """Outputs of all choices; requests come in while others run, and some steps are lost."""
    failing, left = engine.dispatcher, list(wanted)
    assert isinstance(failing, FailingDispatcher)
    found: dict[tuple[str, int], list[TokenOutput]] = {}
    while left or engine.engine.has_work:
        if left and rng.random() < 0.4:
            request = left.pop(0)
            engine.engine.add_request(request)
            found |= {(request.request_id, choice): [] for choice in range(request.n)}
        failing.fail_at = rng.choice((None, None, None, 2))
        try:
            for output in engine.step():
                found[output.request_id, output.choice].append(output)
        except PeerLostError:
            pass
        engine.engine.check_integrity()
    return found


def run_to_the_end(engine: LocalEngine, request: Request) -> list[TokenOutput]:
    """The last output of each choice."""
    return [found[-1] for found in engine.run([request]).values()]


@pytest.mark.slow
def test_dynamic_rope_gives_the_same_tokens_with_and_without(tmp_path: Path) -> None:
    """Prompts below and above the context of 16, which is stretched to 64; some twice."""
    config = {
        **TINY_CONFIG,
        "max_position_embeddings": 16,
        "rope_scaling": {"rope_type": "dynamic", "factor": 4.0},
    }
    write_tiny_checkpoint(tmp_path, config, tiny_tensors())
    wanted = [
        Request(
            request_id=f"r{i}",
            prompt=SYSTEM[:length],
            params=structs.replace(GREEDY, max_tokens=20),
        )
        for i, length in enumerate((12, 16, 17, 24, 33, 16, 24, 33))
    ]
    without = LocalEngine(tmp_path, section=OFF)
    assert without.engine.max_model_len == 64
    expected = [run(without, [request])[0] for request in wanted]
    engine = LocalEngine(tmp_path, section=ON)
    assert [run(engine, [request])[0] for request in wanted] == expected
    # 12 of 16 tokens twice, and all but the last few of the repeated 24 and 33
    assert engine.engine.stats()["prefix_cache_hits_total"] == 12 + 12 + 20 + 32


def test_hashes_that_come_with_a_request_are_not_made_again(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(*_: object) -> bytes:
        raise AssertionError("a hash is made")

    engine = LocalEngine(tiny_checkpoint, section=ON)
    request = Request(request_id="a", prompt=SYSTEM, params=GREEDY)
    hashes = block_hashes(request, ON.block_size_tokens, None)
    monkeypatch.setattr("workers.kv.prefix_cache.chain_hash", make)
    engine.engine.add_request(request, hashes=hashes)
    engine.step()
    assert len(engine.engine.pool.find(hashes)) == len(hashes) == 8
