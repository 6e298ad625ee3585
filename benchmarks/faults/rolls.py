"""Rolls of a model between two checkpoints under load, with a process killed in half of them.

    python -m benchmarks.faults.rolls [--quick] [--rolls N] [--streams N] [--seed N]

``expertmesh serve`` runs two attention and two expert workers of the bundled model. Revisions with
its weights and with changed ones replace each other, in turn beside the active one and in its
place, while clients repeat a request. In half of the rolls SIGKILL ends a random worker, controller
or the keeper of the table, at a random time. Every answer must be that of one of the checkpoints,
from its first to its last token. Ends with status 1 if a request fails or has another answer.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors.torch import load_file, save_file

from benchmarks.harness.server import WAIT_S, Served, running_server
from benchmarks.harness.stalls import wait_until
from benchmarks.report.results import table
from cluster.launch.model_source import bundled_checkpoint

MODEL = "demo"
_PROMPT = tuple(range(10, 42))
_KILLABLE = ("AttentionWorker", "ExpertWorker", "ControllerActor", "ModelsActor")
_NOISE = 0.5
"""Standard deviation of the change of a weight, in standard deviations of its tensor."""
_KILL_WITHIN_S = 3.0
_OPTIONS = (
    *("--served-model-name", MODEL, "--deterministic"),
    *("--num-attention-workers", "2", "--num-expert-workers", "2", "--kv-cache-bytes", "16M"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """Sizes of the measurement."""

    num_rolls: int = 20
    num_streams: int = 16
    num_tokens: int = 64
    """Output tokens of a request."""
    seed: int = 0


QUICK = Case(num_rolls=4, num_streams=2, num_tokens=16)
"""Enough to see that everything runs."""


@dataclass(kw_only=True, slots=True)
class Roll:
    """One change of the revision."""

    is_in_place: bool
    killed: str
    """Class of the killed process; empty without a kill."""
    state: str = ""
    """State of the new revision at the end: ``READY`` or ``FAILED``."""
    took_s: float = 0.0
    num_answers: int = 0
    """Number of requests that ended during the roll."""
    first_s: float = 0.0
    """Longest time to a first token of these."""
    gap_s: float = 0.0
    """Longest time between two tokens of these."""


@dataclass(slots=True)
class Answer:
    """One answered request."""

    tokens: list[int]
    times: list[float]
    """Monotonic times of the request and of each of its tokens."""

    @property
    def gaps(self) -> list[float]:
        """Times between two tokens in seconds."""
        return [after - before for before, after in pairwise(self.times[1:])]

    @property
    def first_s(self) -> float:
        """Time to the first token in seconds."""
        return self.times[1] - self.times[0]


@dataclass(slots=True)
class Clients:
    """Threads that repeat a streamed request until the end of a block."""

    url: str
    body: dict[str, Any]
    answers: list[Answer] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    _is_done: threading.Event = field(default_factory=threading.Event)

    @contextlib.contextmanager
    def running(self, number: int) -> Iterator[None]:
        """Send requests from ``number`` threads within the block."""
        threads = [threading.Thread(target=self._repeat, daemon=True) for _ in range(number)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._is_done.set()
            for thread in threads:
                thread.join(WAIT_S)

    def _repeat(self) -> None:
        with httpx.Client(base_url=self.url, timeout=WAIT_S) as client:
            while not self._is_done.is_set():
                try:
                    self.answers.append(ask(client, self.body))
                except (httpx.HTTPError, RuntimeError) as err:
                    self.failures.append(f"{type(err).__name__}: {err}")


def ask(client: httpx.Client, body: dict[str, Any], **headers: str) -> Answer:
    """Send a streamed completion. Raises ``RuntimeError`` with the error of the answer."""
    found = Answer([], [time.monotonic()])
    sent = {**body, "stream": True}
    with client.stream("POST", "/v1/completions", json=sent, headers=headers) as response:
        if response.status_code != 200:
            raise RuntimeError(response.read().decode())
        for line in response.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise RuntimeError(line)
                found.times.append(time.monotonic())
                found.tokens += [t for c in event["choices"] for t in c["token_ids"] or ()]
    return found


class Rolls:
    """Replaces revisions of the served model."""

    def __init__(self, server: Served, checkpoints: Sequence[Path], draw: random.Random) -> None:
        self._server = server
        self._checkpoints = checkpoints
        self._draw = draw
        self._number = 1

    def run(self, roll: Roll) -> None:
        """Load a revision with the other checkpoint; it becomes active unless it fails."""
        old = self._model()["active"]
        self._number += 1
        new, path = str(self._number), self._checkpoints[(self._number - 1) % 2]
        began_s = time.monotonic()
        self._order("load", path=str(path), revision=new, in_place=roll.is_in_place)
        killer = threading.Timer(self._draw.uniform(0.0, _KILL_WITHIN_S), self._kill, [roll.killed])
        if roll.killed:
            killer.start()
        wait_until(lambda: self._is_settled(new), f"revision {new}")
        roll.state = self._states()[new]
        if roll.state == "READY" and not roll.is_in_place:
            self._order("promote", revision=new)
        if roll.killed:
            killer.join()
        active = self._model()["active"]
        if active == old:  # with the old weights: the next one has the new ones again
            self._number += 1
        self._order("unload", revision=old if active == new else new)
        wait_until(lambda: list(self._states()) == [active], f"revision {active} alone")
        roll.took_s = time.monotonic() - began_s

    def _kill(self, kind: str) -> None:
        if pids := self._server.pids_of(kind):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._draw.choice(sorted(pids)), signal.SIGKILL)

    def _is_settled(self, revision: str) -> bool:
        model = self._model()
        states = {one["name"]: one["state"] for one in model["revisions"]}
        return not model["held"] and states.get(revision) in ("READY", "FAILED")

    def _states(self) -> dict[str, str]:
        return {one["name"]: one["state"] for one in self._model()["revisions"]}

    def _model(self) -> dict[str, Any]:
        found: dict[str, Any] = self._call("GET", "models")["models"][0]
        return found

    def _order(self, kind: str, **body: Any) -> None:
        found = self._call("POST", f"models/{kind}", model=MODEL, **body)
        is_repeated = found.get("error", {}).get("code") == "conflict"  # after an unheard success
        if not is_repeated and "models" not in found:
            raise RuntimeError(f"{kind} {body}: {found}")

    def _call(self, method: str, call: str, /, **body: Any) -> dict[str, Any]:
        """Call the admin port; again while the keeper of the table does not answer."""
        found: dict[str, Any] = {}

        def answers() -> bool:
            response = self._server.admin(method, call, **body)
            found.update(response.json())
            return response.status_code != 503

        wait_until(answers, f"an answer of {call}")
        return found


def measure(case: Case) -> tuple[list[Roll], Clients, dict[str, int]]:
    """Run the rolls. Returns them, the clients, and the number of answers by checkpoint."""
    draw = random.Random(case.seed)
    body = {"model": MODEL, "prompt": list(_PROMPT), "max_tokens": case.num_tokens}
    body |= {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
    rolls = [
        Roll(
            is_in_place=bool(place % 2),
            killed=_KILLABLE[place // 4 % len(_KILLABLE)] if place % 4 > 1 else "",
        )
        for place in range(case.num_rolls)
    ]
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder) / "first", Path(folder) / "second"
        shutil.copytree(bundled_checkpoint(), first)
        change_weights(first, second, case.seed)
        with running_server(Path(folder), str(first), *_OPTIONS) as server:
            runner = Rolls(server, (first, second), draw)
            expected = {"first": ask(server.client, body).tokens}
            runner.run(Roll(is_in_place=False, killed=""))
            expected["second"] = ask(server.client, body).tokens
            if expected["first"] == expected["second"]:
                raise RuntimeError("the checkpoints have equal answers")
            clients = Clients(server.http, body)
            with clients.running(case.num_streams):
                for roll in rolls:
                    _run(runner, roll, clients)
    counts = {
        f"of the {name} checkpoint": sum(answer.tokens == tokens for answer in clients.answers)
        for name, tokens in expected.items()
    }
    counts["of neither"] = len(clients.answers) - sum(counts.values())
    return rolls, clients, counts


def _run(runner: Rolls, roll: Roll, clients: Clients) -> None:
    began_s, num_before = time.monotonic(), len(clients.answers)
    runner.run(roll)
    wait_until(
        lambda: sum(a.times[0] > began_s for a in clients.answers[num_before:]) > 1,
        "answers",
    )
    answers = clients.answers[num_before:]
    roll.num_answers = len(answers)
    roll.first_s = max(a.first_s for a in answers)
    roll.gap_s = max(gap for a in answers for gap in a.gaps)


def change_weights(source: Path, target: Path, seed: int) -> None:
    """Copy a checkpoint, and change all its weights by noise."""
    shutil.copytree(source, target)
    generator = torch.Generator().manual_seed(seed)
    for path in target.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and tensor.numel() > 1:
                noise = torch.randn(tensor.shape, generator=generator)
                changed = tensor.float() + noise * tensor.float().std() * _NOISE
                tensors[name] = changed.to(tensor.dtype)
        save_file(tensors, path, metadata={"format": "pt"})


def report(rolls: Sequence[Roll], clients: Clients, counts: dict[str, int]) -> str:
    """Return the table and a line about the answers."""
    heads = ["roll", "killed", "rolls", "ready", "answers", "roll, median / worst, s"]
    heads += ["first token, worst, s", "gap of tokens, median / worst, s"]
    rows = []
    for in_place in (False, True):
        for killed in sorted({roll.killed for roll in rolls}):
            some = [r for r in rolls if (r.is_in_place, r.killed) == (in_place, killed)]
            if some:
                rows.append(
                    [
                        "in place" if in_place else "beside",
                        killed or "-",
                        str(len(some)),
                        str(sum(r.state == "READY" for r in some)),
                        str(sum(r.num_answers for r in some)),
                        _both([r.took_s for r in some]),
                        f"{max(r.first_s for r in some):.2f}",
                        _both([r.gap_s for r in some]),
                    ]
                )
    answers = ", ".join(f"{number} {name}" for name, number in counts.items())
    failed = f"{len(clients.failures)} requests failed {clients.failures[:1] or ''}".strip()
    return f"{table(heads, rows)}\n\nAnswers: {answers}; {failed}."


def _both(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} / {max(values):.2f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults.rolls", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few short rolls")
    parser.add_argument("--rolls", type=int, default=Case().num_rolls)
    parser.add_argument("--streams", type=int, default=Case().num_streams)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    case = Case(num_rolls=options.rolls, num_streams=options.streams, seed=options.seed)
    rolls, clients, counts = measure(QUICK if options.quick else case)
    sys.stdout.write(f"{report(rolls, clients, counts)}\n")
    if clients.failures or counts["of neither"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
