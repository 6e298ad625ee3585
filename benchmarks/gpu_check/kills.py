"""Workers over NCCL on one device, of which one is killed again and again.

With a transport that can be captured, the survivor's CUDA graphs contain the messages of the lost
worker. A survivor that hangs exceeds the time of the section.
"""

from __future__ import annotations

import time

from benchmarks.gpu_check.section import Place, Report
from benchmarks.gpu_check.workers import KILLED_IN_STEP, Case
from benchmarks.gpu_check.workers import run as run_case
from workers.transport.nccl_environment import set_nccl_environment

_TIMES = 20


def run(place: Place, report: Report) -> None:
    """Kill and replace a worker 20 times, or as often as the time allows."""
    if place.is_gpu:
        set_nccl_environment()  # what is started from now on inherits it
    case = Case(place=place, transport="collective", killed_in_step=KILLED_IN_STEP, alive_s=0.0)
    limit = 1 if place.is_tiny else _TIMES
    started, longest_s, kills = time.monotonic(), 0.0, 0
    while kills < limit and time.monotonic() - started + 2 * longest_s <= place.limit_s:
        began = time.monotonic()
        run_case(case, report)
        longest_s = max(longest_s, time.monotonic() - began)
        kills += 1
    report.value("kills", kills)
    report.say(f"killed and replaced {kills} times, at most {longest_s:.1f} s each")
