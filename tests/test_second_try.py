from __future__ import annotations

import pytest

pytest_plugins = ["pytester"]

CONFTEST = """
from tests.second_try import pytest_runtest_protocol
"""
TESTS = """
import pytest

starts = []

@pytest.fixture(scope="module")
def cluster():
    starts.append(1)
    return len(starts)

@pytest.mark.ray
def test_late(cluster):
    if cluster == 1:
        raise TimeoutError("gave up waiting for the cluster")

@pytest.mark.ray
def test_after_it(cluster):
    assert cluster == 2

@pytest.mark.ray
def test_always_late(cluster):
    raise TimeoutError

@pytest.mark.ray
def test_wrong():
    starts.append(1)
    timeout_s = 3
    assert timeout_s == 4, len(starts)

def test_late_without_processes():
    raise TimeoutError
"""


def test_only_what_ran_out_of_time_is_tried_again(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(TESTS)
    pytester.makeini("[pytest]\nmarkers = ray")
    result = pytester.runpytest("-p", "no:cacheprovider")
    result.assert_outcomes(passed=2, failed=3)
    result.stdout.fnmatch_lines(["*test_late ran out of time, second try:*TimeoutError*"])
    result.stdout.fnmatch_lines(["*test_always_late ran out of time, second try:*"])
    result.stdout.no_fnmatch_line("*test_wrong ran out of time*")
    result.stdout.no_fnmatch_line("*without_processes ran out of time*")
