"""The prefill cap against pretended clusters: steps whose time is a formula."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest

from cluster.config.cluster import EngineSection
from workers.engine.prefill_cap import PrefillCap

StepTime = Callable[[int, int], float]
"""(decode rows, prefill rows) -> seconds."""

TARGET_S = 0.05


def make_cap() -> PrefillCap:
    return PrefillCap(max_rows=512, min_rows=16, target_s=TARGET_S)


def linear(fixed_ms: float, decode_ms: float, prefill_ms: float) -> StepTime:
    """Milliseconds of a step, a decode row, a prompt row."""
    return lambda d, p: (fixed_ms + decode_ms * d + prefill_ms * p) / 1000


def run(
    cap: PrefillCap, step_time: StepTime, num_steps: int, decode_rows: int = 8, wanted: int = 512
) -> list[tuple[int, float]]:
    """(prefill rows, seconds) of steps in which decodes go on and prompts never end."""
    steps = []
    for _ in range(num_steps):
        rows = min(wanted, cap.rows(decode_rows, 1))
        seconds = step_time(decode_rows, rows)
        cap.observe(decode_rows, rows, seconds)
        steps.append((rows, seconds))
    return steps


def settled(cap: PrefillCap, step_time: StepTime, decode_rows: int = 8) -> float:
    """Worst time of 50 steps, after 30 to learn in."""
    run(cap, step_time, 30, decode_rows)
    return max(seconds for _, seconds in run(cap, step_time, 50, decode_rows))


def test_nothing_is_capped_without_decodes() -> None:
    assert make_cap().rows(decode_rows=0, num_ranks=3) == 3 * 512


def test_without_a_target_each_rank_has_its_own_budget() -> None:
    cap = PrefillCap(max_rows=512)
    cap.observe(4, 512, 10.0)
    assert cap.rows(decode_rows=1, num_ranks=3) == 3 * 512


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_with_a_target_prompts_grow_with_the_ranks(num_ranks: int) -> None:
    """The time of a step is that of the rank with the most rows."""
    cap = PrefillCap(max_rows=512, min_rows=16, target_s=TARGET_S)
    step_time = linear(5, 0.5, 0.2)
    rows = seconds = 0.0
    for _ in range(60):
        rows = cap.rows(8, num_ranks)
        seconds = step_time(8, -(-rows // num_ranks))
        cap.observe(8, int(rows), seconds)
    assert 0.75 * TARGET_S < seconds <= TARGET_S
    assert rows > 0.75 * num_ranks * 180


def test_what_is_not_known_starts_small_and_doubles_at_most() -> None:
    rows = [r for r, _ in run(make_cap(), linear(5, 0.5, 0.05), 8)]
    assert rows[0] <= 32
    assert all(after <= 2 * before for before, after in itertools.pairwise(rows))
    assert rows[-1] == 512


@pytest.mark.parametrize(
    "step_time",
    [
        linear(5, 0.5, 0.2),
        linear(1, 0.1, 1.0),
        linear(30, 0.0, 0.5),
        lambda d, p: 0.004 + 0.003 * p**0.5 + 0.0001 * p,  # experts are read once for all rows
        lambda d, p: 0.004 + 0.0002 * p + 1e-6 * p * p,
    ],
    ids=["usual", "dear rows", "dear steps", "concave", "convex"],
)
def test_steps_come_close_to_the_target_and_stay_below(step_time: StepTime) -> None:
    for with_decode_steps in (False, True):
        cap = make_cap()
        if with_decode_steps:
            run(cap, step_time, 20, wanted=0)
        worst = settled(cap, step_time)
        assert 0.75 * TARGET_S < worst <= TARGET_S


def test_a_prefill_without_decodes_shows_what_rows_cost() -> None:
    cap, step_time = make_cap(), linear(5, 0.5, 0.2)
    cap.observe(0, 512, step_time(0, 512))
    run(cap, step_time, 20, wanted=0)
    assert all(seconds <= TARGET_S for _, seconds in run(cap, step_time, 20))


def test_a_target_below_the_decodes_own_time_leaves_the_least() -> None:
    cap, step_time = make_cap(), linear(80, 0, 0.1)
    run(cap, step_time, 10, wanted=0)
    assert {rows for rows, _ in run(cap, step_time, 50)} == {16}


def test_the_cap_follows_a_context_that_grows() -> None:
    cap = make_cap()
    run(cap, linear(5, 0.5, 0.1), 50)
    for context in range(0, 8000, 100):
        step_time = linear(5, 0.5, 0.1 + context / 20_000)
        assert max(s for _, s in run(cap, step_time, 1)) <= TARGET_S


def test_the_cap_follows_the_number_of_decodes() -> None:
    cap, step_time = make_cap(), linear(5, 0.5, 0.1)
    for decode_rows in (1, 64, 8, 2, 40):
        assert settled(cap, step_time, decode_rows) <= TARGET_S


def test_a_hiccup_is_forgotten() -> None:
    cap, step_time = make_cap(), linear(5, 0.5, 0.2)
    usual = run(cap, step_time, 60)[-1][0]
    rows = cap.rows(8, 1)
    cap.observe(8, rows, 3.0)
    assert run(cap, step_time, 12)[-1][0] > 0.9 * usual


def test_a_slow_first_decode_step_does_not_keep_prompts_small_for_ever() -> None:
    """Nothing but mixed steps follows, so that no step shows what decodes alone take."""
    cap, step_time = make_cap(), linear(5, 0.5, 0.2)
    cap.observe(8, 0, 2.0)
    assert run(cap, step_time, 60)[-1][0] > 150
    assert settled(cap, step_time) <= TARGET_S


def test_noise_does_not_matter_much() -> None:
    rng = random.Random(3)
    quiet = linear(5, 0.5, 0.2)
    cap = make_cap()
    steps = run(cap, lambda d, p: quiet(d, p) * rng.uniform(0.8, 1.3), 300)[50:]
    assert sum(seconds for _, seconds in steps) / len(steps) > 0.7 * TARGET_S
    assert max(seconds for _, seconds in steps) < 1.5 * TARGET_S


def test_a_configuration_gives_at_least_a_block() -> None:
    section = EngineSection(
        itl_target_ms=0.001, block_size_tokens=32, max_num_seqs=8, max_num_batched_tokens=64
    )
    cap = PrefillCap.of(section)
    cap.observe(1, 0, 1.0)
    assert cap.rows(decode_rows=1, num_ranks=2) == 32
    assert cap.rows(decode_rows=0, num_ranks=2) == 128


def make_known_cap(decode_s: float = 0.010, decode_rows: int = 8) -> PrefillCap:
    """A cap that knows the time of a decode step, and that a prompt row takes 20 us."""
    cap = PrefillCap(max_rows=10_000, min_rows=500, target_s=TARGET_S)
    cap.observe(0, 10_000, 0.2)
    cap.observe(8, 2000, 0.04)  # shows that 2000 rows fit
    cap.observe(decode_rows, 0, decode_s)
    return cap


def test_the_milliseconds_of_a_configuration_are_its_target() -> None:
    section = EngineSection(
        itl_target_ms=50.0, block_size_tokens=16, max_num_seqs=8, max_num_batched_tokens=1 << 20
    )
    cap = PrefillCap(max_rows=1 << 20, min_rows=16, target_s=0.05)
    step_time = linear(5, 0.5, 0.0005)
    wanted = 1 << 20
    steps = run(PrefillCap.of(section), step_time, 40, wanted=wanted)
    assert steps == run(cap, step_time, 40, wanted=wanted)
    assert 50_000 < steps[-1][0] < wanted


def test_prompts_get_what_decodes_leave_of_nine_tenths_of_the_target() -> None:
    assert make_known_cap(decode_s=0.010).rows(8, 1) == pytest.approx(0.035 / 20e-6, abs=1)
    assert make_known_cap(decode_s=0.0449).rows(8, 1) == 500
    assert make_known_cap(decode_s=0.9 * TARGET_S).rows(8, 1) == 500


def test_decodes_that_leave_no_time_leave_the_least_before_any_prompt_was_seen() -> None:
    for decode_s, rows in ((0.9 * TARGET_S, 16), (0.89 * TARGET_S, 32)):
        cap = make_cap()
        cap.observe(8, 0, decode_s)
        assert cap.rows(8, 1) == rows


def test_an_estimate_of_decodes_moves_half_way_and_a_slow_step_counts_as_twice_as_long() -> None:
    cap = make_known_cap(decode_s=0.010)
    cap.observe(8, 0, 0.014)
    assert cap.rows(8, 1) == pytest.approx((0.045 - 0.012) / 20e-6, abs=1)
    cap.observe(8, 0, 1.0)
    assert cap.rows(8, 1) == pytest.approx((0.045 - 0.018) / 20e-6, abs=1)


def test_decodes_of_about_the_same_number_share_an_estimate() -> None:
    cap = make_known_cap(decode_s=0.010, decode_rows=4)
    cap.observe(5, 0, 0.020)
    assert cap.rows(3, 1) == cap.rows(4, 1) == pytest.approx(0.035 / 20e-6, abs=1)
    assert cap.rows(5, 1) == cap.rows(8, 1) == pytest.approx(0.025 / 20e-6, abs=1)
    cap.observe(64, 0, 0.030)
    assert cap.rows(32, 1) == cap.rows(64, 1) == pytest.approx(0.015 / 20e-6, abs=1)
    assert cap.rows(1, 1) == cap.rows(4, 1)


@pytest.mark.parametrize(("seconds", "rows"), [(0.05, 512), (0.0501, 32), (1.5 * TARGET_S, 32)])
def test_as_many_rows_fit_as_a_step_within_the_target_had(seconds: float, rows: int) -> None:
    cap = PrefillCap(max_rows=1024, min_rows=16, target_s=0.05)
    cap.observe(256, 256, seconds)
    cap.observe(0, 10**9, 0.0)  # rows cost nothing: only what fitted counts
    cap.observe(1, 0, 0.001)
    assert cap.rows(1, 1) == rows


def test_a_step_far_above_the_target_halves_the_cap() -> None:
    cap = PrefillCap(max_rows=4096, min_rows=16, target_s=0.05)
    cap.observe(1, 1000, 0.05)
    cap.observe(1, 1000, 0.0751)
    cap.observe(1, 0, 0.001)
    for _ in range(60):
        cap.observe(0, 10**9, 0.0)
    assert cap.rows(1, 1) == 500
