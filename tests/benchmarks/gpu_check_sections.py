"""Sections for tests of what runs them."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading

from benchmarks.gpu_check.section import Place, Report


def right(place: Place, report: Report) -> None:
    report.value("limit_s", place.limit_s)
    report.value("folder", place.folder)
    report.value("not a number", [math.nan, {"x": math.inf}])
    report.check(True, "is so")
    print("for the log")
    report.say("all is well")


def wrong(place: Place, report: Report) -> None:
    report.check(False, "2 is not 3")
    with report.part("division"):
        report.value("nothing", 1 / 0)
    report.value("after", 1)


def raises(place: Place, report: Report) -> None:
    raise ValueError("on purpose")


def hangs(place: Place, report: Report) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    report.value("child", child.pid)
    threading.Event().wait()


def says_pid(place: Place, report: Report) -> None:
    report.value("pid", os.getpid())


def meets_one(place: Place, report: Report) -> None:
    with open(os.environ["MEETING"], "w"):  # waits until the other one reads
        report.say("met")


def meets_other(place: Place, report: Report) -> None:
    with open(os.environ["MEETING"]):
        report.say("met")


def crashes(place: Place, report: Report) -> None:
    report.value("before", 1)
    os.write(2, b"out of memory\n")
    os._exit(3)
