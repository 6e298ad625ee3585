"""Processes by id."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import psutil
import pytest

from cluster.core.process import (
    ProcessIdentity,
    describe_self,
    is_running,
    kill_process,
    wait_gone,
)


def test_a_reused_id_is_another_process() -> None:
    me = describe_self()
    assert me.pid == os.getpid()
    assert is_running(me)
    assert not is_running(ProcessIdentity(pid=me.pid, started_at=me.started_at - 100))


def test_a_stopped_process_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as child:
        started = psutil.Process(child.pid).create_time()
        process = ProcessIdentity(pid=child.pid, started_at=started)
        os.kill(child.pid, signal.SIGSTOP)
        assert is_running(process)
        kill_process(process)
        reaper = threading.Thread(target=child.wait)
        reaper.start()
        assert wait_gone(process, 60.0)
        reaper.join()
        kill_process(process)  # gone: nothing happens


def test_a_process_that_ends_by_itself_meanwhile_is_no_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        child.wait()
        monkeypatch.setattr("cluster.core.process.is_running", lambda process: True)
        kill_process(ProcessIdentity(pid=child.pid, started_at=0.0))


def test_waiting_for_a_process_that_stays_ends_in_time() -> None:
    assert not wait_gone(describe_self(), 0.05)
