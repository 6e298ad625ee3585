"""Front process and launcher as real processes; only Ray is replaced by a sleeping child."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from benchmarks.harness.stalls import wait_until
from cluster.cli.cluster.down import end_cluster
from cluster.core.process import is_running
from cluster.launch import state_file
from cluster.launch.orphans import end_private_ray, find_by_files
from tests.cluster.cli.fake_launcher import stages_path

pytestmark = pytest.mark.distributed

LIMIT_S = 120.0
"""Longest wait for anything, on a machine that is busy with other work."""


@dataclass(slots=True)
class FrontProcess:
    """One fake front process of a test."""

    child: subprocess.Popen[str]
    folder: Path = Path()

    def wait_ready(self) -> None:
        assert self.child.stdout is not None
        line = self.child.stdout.readline()
        assert line.startswith("ready "), line
        self.folder = Path(line.split()[1])

    def end(self, limit_s: float = LIMIT_S) -> tuple[int, str]:
        """Exit code and stderr."""
        _, errors = self.child.communicate(timeout=limit_s)
        return self.child.returncode, errors


StartFront = Callable[..., FrontProcess]


@pytest.fixture
def start_front(state_home: Path) -> Iterator[StartFront]:
    started: list[FrontProcess] = []

    def start(
        name: str = "one", detach: bool = False, how: str = "", join: bool = False
    ) -> FrontProcess:
        words = [name, "join" if join else "detach" if detach else "stay"]
        child = subprocess.Popen(
            [sys.executable, "-m", "tests.cluster.cli.fake_front", *words],
            env={**os.environ, "FAKE_PARTS": how},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(FrontProcess(child))
        return started[-1]

    yield start
    for front in started:
        front.child.kill()
        front.child.communicate()
    for record in state_file.all_records():
        end_cluster(record, LIMIT_S)


def is_clean(folder: Path) -> bool:
    return not folder.exists() and find_by_files(folder) == []


def launcher_of(name: str) -> psutil.Process:
    record = state_file.read_record(name)
    assert record is not None
    return psutil.Process(record.launcher.pid)


def told_stages() -> list[str]:
    path = stages_path("one")
    return path.read_text().split() if path.exists() else []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_everything(start_front: StartFront, number: int, code: int) -> None:
    front = start_front()
    front.wait_ready()
    assert find_by_files(front.folder)
    front.child.send_signal(number)
    assert front.end()[0] == code
    assert is_clean(front.folder)
    assert state_file.read_record("one") is None
    assert not state_file.log_path("one").exists()


def test_what_the_workers_compute_with_is_said_at_the_start(start_front: StartFront) -> None:
    front = start_front(how="threads")
    front.wait_ready()
    front.child.send_signal(signal.SIGTERM)
    code, said = front.end()
    assert code == 0
    words = "1 worker with 2 compute threads, 1 worker with 1 compute thread"
    assert words in said.splitlines()


def test_sigint_ends_it_also_when_started_with_sigint_ignored(start_front: StartFront) -> None:
    ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)  # what a shell does for `command &`
    try:
        front = start_front()
    finally:
        signal.signal(signal.SIGINT, ignored)
    front.wait_ready()
    front.child.send_signal(signal.SIGINT)
    assert front.end()[0] == 130
    assert is_clean(front.folder)


def test_a_signal_during_the_start_ends_it(start_front: StartFront) -> None:
    front = start_front(how="slow")
    wait_until(lambda: state_file.read_record("one") is not None)
    record = state_file.read_record("one")
    assert record is not None
    folder = Path(record.temp_dir)
    wait_until(lambda: (folder / "child.log").exists())
    front.child.send_signal(signal.SIGTERM)
    assert front.end()[0] == 130
    assert is_clean(folder)


def test_a_second_signal_forces_the_end(start_front: StartFront) -> None:
    front = start_front(how="stuck")
    front.wait_ready()
    front.child.send_signal(signal.SIGTERM)
    assert front.child.stderr is not None
    assert front.child.stderr.readline().startswith("stopping")  # two that meet are one
    front.child.send_signal(signal.SIGTERM)
    assert front.end()[0] == 0
    assert is_clean(front.folder)


@pytest.mark.parametrize(
    ("number", "how", "stages"),
    [
        (signal.SIGTERM, "busy", ["lead", "refuse", "refuse", "refuse"]),
        (signal.SIGTERM, "late", ["lead", "refuse"]),
        (signal.SIGTERM, "", ["lead", "refuse"]),
        (signal.SIGINT, "endless", []),
    ],
)
def test_sigterm_lets_requests_end(
    start_front: StartFront, number: int, how: str, stages: list[str]
) -> None:
    front = start_front(how=how)
    front.wait_ready()
    front.child.send_signal(number)
    assert front.end()[0] == (0 if number == signal.SIGTERM else 130)
    assert is_clean(front.folder)
    assert told_stages() == stages


@pytest.mark.parametrize("who", ["down", "killed front", "signal"])
def test_a_drain_can_be_cut_short(start_front: StartFront, who: str) -> None:
    front = start_front(how="endless")
    front.wait_ready()
    front.child.send_signal(signal.SIGTERM)
    wait_until(lambda: told_stages()[-1:] == ["refuse"])
    record = state_file.read_record("one")
    assert record is not None
    if who == "down":
        end_cluster(record, LIMIT_S)
    elif who == "signal":
        front.child.send_signal(signal.SIGTERM)
    else:
        front.child.kill()
    assert front.end()[0] == (-signal.SIGKILL if who == "killed front" else 0)
    wait_until(lambda: is_clean(front.folder) and state_file.read_record("one") is None)


def test_a_killed_front_process_takes_the_cluster_along(start_front: StartFront) -> None:
    front = start_front()
    front.wait_ready()
    front.child.kill()
    wait_until(lambda: is_clean(front.folder))
    wait_until(lambda: state_file.read_record("one") is None)


@pytest.mark.usefixtures("start_front")
def test_a_killed_make_takes_the_cluster_along() -> None:
    """``make serve`` passes its process id down; nobody tells the front process of a SIGKILL."""
    front = f"EXPERTMESH_PARENT=$$ {sys.executable} -m tests.cluster.cli.fake_front one stay"
    make = subprocess.Popen(["sh", "-c", f"{front} & wait"], stdout=subprocess.PIPE, text=True)
    assert make.stdout is not None
    folder = Path(make.stdout.readline().split()[1])
    make.kill()
    make.communicate(timeout=LIMIT_S)  # until the front process has closed it too
    wait_until(lambda: is_clean(folder) and state_file.read_record("one") is None)


def test_a_killed_launcher_is_cleaned_up_by_the_front_process(start_front: StartFront) -> None:
    front = start_front()
    front.wait_ready()
    launcher_of("one").kill()
    code, errors = front.end()
    assert code == 1
    assert "the launcher ended unexpectedly" in errors
    assert is_clean(front.folder)


def test_a_signal_does_not_interrupt_the_cleaning_up(start_front: StartFront) -> None:
    front = start_front(how="signalled")
    front.wait_ready()
    launcher_of("one").kill()
    assert front.end() == (0, "stopping once the running requests have ended\n")
    assert is_clean(front.folder)
    assert state_file.read_record("one") is None


def test_a_later_start_cleans_up_when_both_were_killed(start_front: StartFront) -> None:
    front = start_front()
    front.wait_ready()
    launcher = launcher_of("one")
    os.kill(front.child.pid, signal.SIGSTOP)  # so that neither sees the other die
    launcher.kill()
    front.child.kill()
    front.child.wait()
    assert find_by_files(front.folder)
    other = start_front("two")
    other.wait_ready()
    assert is_clean(front.folder)
    assert find_by_files(other.folder)


def test_a_failed_start_says_why(start_front: StartFront) -> None:
    code, errors = start_front(how="fail").end()
    assert code == 1
    assert errors == "expert-1 did not start: its disk is on fire\n"
    assert state_file.read_record("one") is None


def test_a_refusal_of_the_launcher_keeps_its_exit_code(start_front: StartFront) -> None:
    assert start_front(how="refuse").end() == (5, "port (1) differs\n")


def test_an_unforeseen_error_takes_one_line(start_front: StartFront) -> None:
    log = state_file.log_path("one")
    assert start_front(how="bug").end() == (1, f"RuntimeError: the actor died, see {log}\n")
    assert "and a page more" in log.read_text()


def test_a_crash_during_the_start_is_cleaned_up(start_front: StartFront) -> None:
    front = start_front(how="crash")
    code, errors = front.end()
    assert code == 1
    assert str(state_file.log_path("one")) in errors
    assert state_file.read_record("one") is None


def test_a_lost_cluster_ends_the_front_process(start_front: StartFront) -> None:
    front = start_front(how="lost")
    front.wait_ready()
    assert front.end() == (1, "the controller is lost\n")
    assert is_clean(front.folder)


def test_detached_the_cluster_stays_until_down(start_front: StartFront) -> None:
    front = start_front(detach=True)
    front.wait_ready()
    assert front.end()[0] == 0
    time.sleep(1.0)
    record = state_file.read_record("one")
    assert record is not None
    assert record.is_alive
    assert record.state == "ready"
    end_cluster(record, LIMIT_S)
    assert is_clean(front.folder)
    assert not is_running(record.launcher)
    assert state_file.read_record("one") is None


def test_down_ends_what_a_killed_launcher_left(start_front: StartFront) -> None:
    front = start_front(detach=True)
    front.wait_ready()
    front.end()
    record = state_file.read_record("one")
    assert record is not None
    os.kill(record.launcher.pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(record.launcher.pid, 0)
    end_cluster(record, LIMIT_S)
    assert is_clean(front.folder)


def test_two_side_by_side(start_front: StartFront) -> None:
    one, two = start_front("one"), start_front("two")
    one.wait_ready()
    two.wait_ready()
    one.child.send_signal(signal.SIGTERM)
    assert one.end()[0] == 0
    assert is_clean(one.folder)
    assert find_by_files(two.folder)


def test_what_up_starts_in_a_joined_ray_has_no_owner(start_front: StartFront) -> None:
    """The launcher goes with its front; the record stays, also when a later start fails."""
    front = start_front(join=True)
    front.wait_ready()
    try:
        assert front.end()[0] == 0
        record = state_file.read_record("one")
        assert record is not None
        assert record.is_detached
        wait_until(lambda: not is_running(record.launcher))
        assert find_by_files(front.folder)
        refused = start_front(join=True, how="refuse")
        assert refused.end()[0] == 5
        assert state_file.read_record("one") == record
    finally:
        end_private_ray(front.folder, ())
        state_file.remove_record("one")
