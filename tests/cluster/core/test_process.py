"""Processes by id."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from cluster.core.process import (
    ProcessIdentity,
    describe_self,
    import_at_low_priority,
    is_running,
    kill_process,
    wait_gone,
    yield_cpus_to_others,
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


def test_an_import_at_low_priority_leaves_the_priority_of_its_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "import os, threading\n"
    text += "priority = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())\n"
    (tmp_path / "imported_idly.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    import_at_low_priority("imported_idly")
    assert sys.modules.pop("imported_idly").priority == 15
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        import_at_low_priority("no_such_module")


def test_the_priority_of_an_ended_process_is_nothing() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield_cpus_to_others(child.pid)
    assert os.getpriority(os.PRIO_PROCESS, child.pid) == 15
    child.communicate()
    yield_cpus_to_others(child.pid)
