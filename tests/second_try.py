"""A test of real processes that ran out of time is tried once more; no other failure is.

Limits of waits are generous, but a machine that stands still for a minute meets every limit. What
a test compares must be right at the first try. The report shows an ``R`` for the try that failed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
from _pytest.runner import runtestprotocol

_OUT_OF_TIME = re.compile(r"[Tt]imed? ?out|gave up waiting|DEADLINE|built-in function monotonic")


def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """See the module; None leaves a test to pytest."""
    if item.get_closest_marker("ray") is None:
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    reports = runtestprotocol(item, log=False, nextitem=nextitem)
    if any(ran_out_of_time(report) for report in reports):
        _show(item, reports)
        item.session._setupstate.teardown_exact(None)  # clusters that the module shares, too
        reports = runtestprotocol(item, log=False, nextitem=nextitem)
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def ran_out_of_time(report: pytest.TestReport) -> bool:
    """Whether a part of a test failed by a limit of time."""
    return report.failed and bool(_OUT_OF_TIME.search(_raised(report)))


def _raised(report: pytest.TestReport) -> str:
    """What was raised; not the source around it, which may speak of limits too."""
    lines = report.longreprtext.splitlines()
    return "\n".join(line for line in lines if line.startswith("E "))


def _show(item: pytest.Item, reports: Sequence[pytest.TestReport]) -> None:
    """Say on the terminal why there is a second try."""
    terminal = item.config.pluginmanager.get_plugin("terminalreporter")
    if terminal is None:
        return
    failed = next(report for report in reports if report.failed)
    terminal.write("R", yellow=True)
    for line in _raised(failed).splitlines()[-3:]:
        terminal.write_line(f"\n{item.nodeid} ran out of time, second try: {line}")
