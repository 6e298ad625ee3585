"""The engine with recurrent states: the same bits however rows are cut, found, lost or repeated."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from msgspec import structs

from benchmarks.harness.local_engine import LocalEngine, block_bytes
from cluster.config.cluster import EngineSection
from cluster.core.errors import PeerLostError
from tests.fakes import FailingDispatcher
from tests.harness.tiers import quick_rows
from tests.reference.exact import exact
from tests.reference.goldens import MAX_MODEL_LEN, Golden
from workers.requests.request import Request, SamplingParams, TokenOutput

pytestmark = pytest.mark.heavy

BLOCK = 4
SECTION = EngineSection(
    block_size_tokens=BLOCK, max_num_seqs=6, max_num_batched_tokens=24, deterministic="on"
)
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, logprobs=1)
SYSTEM = tuple(random.Random(1).choices(range(6, 512), k=33))
"""What most prompts begin with."""

MakeEngine = Callable[..., LocalEngine]


@pytest.fixture(scope="module", params=quick_rows({"auto"}, ["auto", "torch"]))
def make(golden: Callable[[str], Golden], request: pytest.FixtureRequest) -> MakeEngine:
    """Engines of a small model whose layers have states, exact in either kind of kernels."""
    path = golden("qwen3next-official-like").path

    def engine(section: EngineSection = SECTION, **more: object) -> LocalEngine:
        return LocalEngine(
            path,
            section=section,
            max_model_len=MAX_MODEL_LEN,
            kernels=request.param,
            **more,  # type: ignore[arg-type]
        )

    return engine


def prompts(count: int, seed: int = 3) -> list[tuple[int, ...]]:
    """Prompts of which each begins with a part of ``SYSTEM``."""
    rng = random.Random(seed)
    return [
        SYSTEM[: rng.choice([0, 8, 17, 33])]
        + tuple(rng.choices(range(6, 512), k=rng.randint(1, 9)))
        for _ in range(count)
    ]


def requests(name: str, count: int = 10, **more: object) -> list[Request]:
    params = structs.replace(GREEDY, **more)
    return [
        Request(request_id=f"{name}{i}", prompt=p, params=structs.replace(params, seed=i))
        for i, p in enumerate(prompts(count))
    ]


def run(engine: LocalEngine, wanted: Sequence[Request]) -> list[tuple[object, ...]]:
    """What clients get of each choice, with the accounts checked after each step."""
    for request in wanted:
        engine.engine.add_request(request)
    found: dict[tuple[str, int], list[TokenOutput]] = {
        (r.request_id, choice): [] for r in wanted for choice in range(r.n)
    }
    while engine.engine.has_work:
        for output in engine.step():
            found[output.request_id, output.choice].append(output)
        engine.engine.check_integrity()
    return [exact(outputs) for outputs in found.values()]


def alone(engine: LocalEngine, wanted: Sequence[Request]) -> list[tuple[object, ...]]:
    return [own for request in wanted for own in run(engine, [request])]


@pytest.fixture(scope="module")
def expected(make: MakeEngine) -> list[tuple[object, ...]]:
    """Each request alone, in one chunk and without the prefix cache."""
    section = replace(SECTION, max_num_batched_tokens=256, enable_prefix_caching=False)
    return alone(make(section), requests("a"))


@pytest.mark.parametrize("rows", quick_rows({7}, [6, 7, 24, 64]))
@pytest.mark.parametrize("num_micro_batches", quick_rows({2}, [1, 2]))
def test_rows_do_not_depend_on_how_they_are_cut(
    make: MakeEngine, expected: list[tuple[object, ...]], rows: int, num_micro_batches: int
) -> None:
    section = replace(SECTION, max_num_batched_tokens=rows)
    engine = make(section, num_micro_batches=num_micro_batches)
    assert run(engine, requests("a")) == expected
    assert run(engine, requests("b")) == expected
    assert engine.engine.stats()["prefix_cache_hits_total"] > 0


@pytest.mark.parametrize("num_cached_states", quick_rows({2}, [0, 2, 32]))
def test_preempted_sequences_go_on_with_the_same_bits(
    make: MakeEngine, expected: list[tuple[object, ...]], num_cached_states: int
) -> None:
    each = block_bytes(make().config, BLOCK, make().dtype)
    section = replace(SECTION, kv_cache_bytes=26 * each, num_cached_states=num_cached_states)
    engine = make(section)
    assert run(engine, requests("a")) == expected
    assert engine.engine.stats()["num_preemptions_total"] > 0


def test_abandoned_steps_leave_all_states_as_they_were(
    make: MakeEngine, expected: list[tuple[object, ...]]
) -> None:
    engine = make(wrap=FailingDispatcher)
    dispatcher, rng = engine.dispatcher, random.Random(5)
    assert isinstance(dispatcher, FailingDispatcher)
    for request in requests("a"):
        engine.engine.add_request(request)
    found: dict[str, list[TokenOutput]] = {r.request_id: [] for r in requests("a")}
    while engine.engine.has_work:
        dispatcher.fail_at = rng.choice([None, *range(7)])
        dispatcher.leaves_out = rng.random() < 0.1
        try:
            outputs = engine.step()
        except PeerLostError:
            outputs = []
        engine.engine.check_integrity()
        for output in outputs:
            found[output.request_id].append(output)
    assert dispatcher.num_failures > 5
    assert [exact(outputs) for outputs in found.values()] == expected


def test_choices_share_the_state_behind_their_prompt(make: MakeEngine) -> None:
    params = SamplingParams(max_tokens=6, temperature=2.0, seed=3, ignore_eos=True, logprobs=1)
    wanted = [
        Request(request_id=f"n{i}", prompt=p, params=params, n=3) for i, p in enumerate(prompts(4))
    ]
    plain = replace(SECTION, enable_prefix_caching=False)
    found = run(make(plain), wanted)
    engine = make()
    assert run(engine, wanted) == found
    cached = engine.engine.stats()["prefix_cache_hits_total"]
    assert cached >= 2 * sum((len(r.prompt) - 1) // BLOCK * BLOCK for r in wanted)


def test_a_prompt_goes_on_from_an_output(make: MakeEngine) -> None:
    """The next turn of a chat begins behind the last full block of the last one."""
    first = Request(request_id="a", prompt=SYSTEM, params=GREEDY)
    engine = make()
    (outputs,) = engine.run([first]).values()
    longer = SYSTEM + tuple(t for o in outputs for t in o.token_ids) + (7, 8, 9)
    again = Request(request_id="b", prompt=longer, params=GREEDY)
    (found,) = engine.run([again]).values()
    assert found[0].num_cached_tokens == (len(SYSTEM) + GREEDY.max_tokens - 1) // BLOCK * BLOCK
    (fresh,) = make().run([again]).values()
    assert [o.token_ids for o in found] == [o.token_ids for o in fresh]


def test_the_third_prompt_with_the_same_beginning_reuses_it(make: MakeEngine) -> None:
    """The first one does not know where others branch off, the second one does."""
    engine = make()
    cached = []
    for i in range(3):
        prompt = (*SYSTEM, *range(100 + 40 * i, 130 + 40 * i))
        request = Request(request_id=str(i), prompt=prompt, params=GREEDY)
        (outputs,) = engine.run([request]).values()
        cached.append(outputs[0].num_cached_tokens)
    stats = engine.engine.stats()
    assert stats["recurrent_states_free"] == stats["recurrent_states_total"] == SECTION.num_states
    assert cached[0] == 0
    assert cached[2] == len(SYSTEM) // BLOCK * BLOCK
