"""The systems that are compared, each in a process of its own; see ``child.py``."""

from __future__ import annotations

import json
import os
import selectors
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from benchmarks.harness.ray_serving import FOLDER_VARIABLE
from benchmarks.report.timing import Times
from cluster.launch.local_ray import make_temp_dir, private_environment

THREADS = 2
"""Compute threads of each system: two in one process, or two workers with one each."""
ANSWER_LIMIT_S = 300.0
"""Longest wait for a model to load or a batch to end."""
_END_LIMIT_S = 30.0


class System:
    """One system with one model loaded. Idle unless it generates."""

    def __init__(self, name: str, command: Sequence[str], environment: dict[str, str]) -> None:
        """``command`` is a program with the protocol of ``child.py``."""
        self._name = name
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )

    def wait_loaded(self) -> None:
        """Raises ``RuntimeError`` when it does not start."""
        self._answer()

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Times:
        """Serve a batch; by sequence the seconds to each token. Raises ``RuntimeError``."""
        stdin = _open(self._process.stdin)
        stdin.write(json.dumps({"prompts": prompts, "new_tokens": new_tokens}) + "\n")
        stdin.flush()
        times: list[list[float]] = json.loads(self._answer())
        wrong = [len(t) for t in times if len(t) != new_tokens]
        if wrong:
            raise RuntimeError(f"{self._name} made {wrong[0]} tokens instead of {new_tokens}")
        return times

    def close(self) -> None:
        """End the process."""
        _open(self._process.stdin).close()
        try:
            self._process.wait(_END_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(_END_LIMIT_S)
        _open(self._process.stdout).close()

    def _answer(self) -> str:
        """The next line; the child writes whole lines only, one for each of ours."""
        stdout = _open(self._process.stdout)
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            if not selector.select(ANSWER_LIMIT_S):
                raise RuntimeError(f"{self._name} gave no answer within {ANSWER_LIMIT_S:g} s")
        line = stdout.readline()
        if not line:
            raise RuntimeError(f"{self._name} ended")
        return line


@contextmanager
def running(names: Sequence[str], checkpoint: Path) -> Iterator[dict[str, System]]:
    """Start systems one after the other, end them afterwards."""
    folders: list[Path] = []
    systems: dict[str, System] = {}
    try:
        for name in names:
            command = [sys.executable, "-m", "benchmarks.harness.child", name, str(checkpoint)]
            systems[name] = System(name, command, _environment(name, folders))
            systems[name].wait_loaded()
        yield systems
    finally:
        for system in systems.values():
            system.close()
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def _environment(name: str, folders: list[Path]) -> dict[str, str]:
    """A cluster gets a Ray of its own, in a new folder that is added to ``folders``."""
    if name.startswith("ray"):
        folder = make_temp_dir()
        folders.append(folder)
        return {**private_environment(folder), FOLDER_VARIABLE: str(folder)}
    return {**os.environ, "OMP_NUM_THREADS": str(THREADS)}


def _open(stream: IO[str] | None) -> IO[str]:
    assert stream is not None, "opened with a pipe"
    return stream
