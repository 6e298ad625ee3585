"""How long streams pause when something is killed, stopped or drained: the table of faults.

python -m benchmarks.reliability [--rows expert-copies,attention] [--repetitions 20] [--quick]

24 clients on a private Ray with the bundled model, default settings, detection limit 2 s. Each
repetition waits for full flow, does the fault at a random moment, and takes the longest time
between two deltas of any stream from then until all flow again. Then the load stops until
the cluster has replaced what it lost; a cluster that does not is started anew.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil
from ray.exceptions import RayError

from benchmarks.fault_load import FaultLoad, wait
from benchmarks.results import table
from cluster.launch.model_source import bundled_checkpoint
from cluster.policy.silence import WINDOW_S
from tests.harness.cluster_gateway import gateway_of
from tests.harness.mixed_calls import make_calls
from tests.harness.serving_cluster import RayCluster, connected_ray, make_config, serving

logger = logging.getLogger(__name__)

DETECTION_LIMIT_S = 2.0
_RESTORE_LIMIT_S = 20.0
_CALM_S = 1.0
_FORGET_S = 3 * WINDOW_S
"""Time after which a start and the gaps of its time count no more."""


class Site:
    """The cluster of one row, as the faults see it."""

    def __init__(self, cluster: RayCluster, draw: random.Random) -> None:
        self.cluster = cluster
        self._draw = draw
        self._stopped: list[int] = []
        self._second: subprocess.Popen[str] | None = None

    def snapshot(self) -> dict[str, Any]:
        """The controller's, as soon as there is one that answers."""
        while True:
            try:
                return self.cluster.snapshot()
            except RayError:  # it is being restarted
                time.sleep(0.02)

    def names(self, role: str, count: int = 1) -> list[str]:
        """Workers of a role that serve, drawn by lot."""
        workers = self.snapshot()["workers"]
        found = [w["name"] for w in workers if w["role"] == role and w["state"] == "SERVING"]
        return self._draw.sample(sorted(found), count)

    def signal(self, names: Sequence[str], number: signal.Signals) -> None:
        """Send a signal to workers' processes, at once."""
        pids = {w["name"]: int(w["pid"]) for w in self.snapshot()["workers"]}
        for name in names:
            os.kill(pids[name], number)
            if number is signal.SIGSTOP:
                self._stopped.append(pids[name])

    def kill_controller(self) -> None:
        """``kill -9`` of the controller's process."""
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if child.cmdline()[:1] == ["ray::ControllerActor"]:
                    child.kill()
                    return
        raise RuntimeError("the controller's process is not found")

    def start_second_gateway(self) -> None:
        """Another gateway with clients of its own; returns when they get tokens."""
        self._second = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.second_gateway"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._second.stdin is not None
        assert self._second.stdout is not None
        given = {"config": self.cluster.config.to_dict(), "snapshot": self.snapshot()}
        self._second.stdin.write(json.dumps(given) + "\n")
        self._second.stdin.flush()
        if self._second.stdout.readline() != "flowing\n":
            raise RuntimeError("the second gateway does not serve")

    def kill_second_gateway(self) -> None:
        """``kill -9`` of it."""
        assert self._second is not None
        self._second.kill()
        self._second.communicate()

    def drain(self, name: str) -> None:
        """Order a drain and wait until it has ended."""
        begun = self.cluster.call("drain", {"worker": name, "limit_s": 60.0})
        find = self.cluster.call
        wait(lambda: find("operation", begun["id"])["state"] != "RUNNING", "the end of a drain")
        ended = find("operation", begun["id"])
        if ended["state"] != "SUCCEEDED":
            raise RuntimeError(str(ended["message"]))

    def close(self) -> None:
        """Leave nothing behind."""
        self.wake()
        if self._second is not None and self._second.poll() is None:
            self.kill_second_gateway()

    def wake(self) -> None:
        """Let what was stopped go on: it must not disturb."""
        for pid in self._stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self._stopped.clear()


Fault = Callable[[Site], object]


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One row of the table."""

    name: str
    """For ``--rows``."""
    text: str
    """For people."""
    limit: str
    """Stall that is asked for, median / worst."""
    attention: int
    """Attention workers."""
    experts: int
    """Expert workers."""
    redundant: int = 0
    """Spare slots; 22 of 3 workers give every expert a second copy."""
    fault: Fault
    """What happens."""
    prepare: Fault = lambda site: None
    """What must be there before."""
    changes: str = "generation"
    """Key of the snapshot that grows when the cluster has dealt with it; empty: none does."""


def _kill_during_change(site: Site) -> None:
    first, second = site.names("expert", 2)
    before = site.snapshot()["generation"]
    site.signal([first], signal.SIGKILL)
    wait(
        lambda: (now := site.snapshot())["state"] == "RECOVERING" or now["generation"] > before,
        "the generation change",
    )
    site.signal([second], signal.SIGKILL)


def _kill(role: str, count: int = 1) -> Fault:
    return lambda site: site.signal(site.names(role, count), signal.SIGKILL)


def _stop(role: str) -> Fault:
    return lambda site: site.signal(site.names(role), signal.SIGSTOP)


def forget_start(site: Site) -> None:
    """Let the controller forget how a start kept the machine busy."""
    time.sleep(_FORGET_S)


def _kill_both(site: Site) -> None:
    names = site.names("expert")
    site.kill_controller()
    with contextlib.suppress(ProcessLookupError):
        site.signal(names, signal.SIGKILL)


def _drain(role: str) -> Fault:
    return lambda site: site.drain(site.names(role)[0])


_FROZEN = f"0.5 / {DETECTION_LIMIT_S + 0.5:g} s"
ROWS = (
    Row(
        name="expert-copies",
        text="kill -9 an expert worker, copies elsewhere (1 + 3)",
        limit="0.1 / 0.5 s",
        attention=1,
        experts=3,
        redundant=22,
        fault=_kill("expert"),
    ),
    Row(
        name="expert-only",
        text="kill -9 an expert worker with the only copies (1 + 2)",
        limit="1 / 3 s",
        attention=1,
        experts=2,
        fault=_kill("expert"),
    ),
    Row(
        name="two-experts",
        text="kill -9 two expert workers at once (1 + 4)",
        limit="worst 3 s",
        attention=1,
        experts=4,
        fault=_kill("expert", 2),
    ),
    Row(
        name="during-change",
        text="kill -9 another one during the generation change (1 + 4)",
        limit="worst 3 s",
        attention=1,
        experts=4,
        fault=_kill_during_change,
    ),
    Row(
        name="attention",
        text="kill -9 an attention worker (2 + 2)",
        limit="0.5 / 2 s",
        attention=2,
        experts=2,
        fault=_kill("attention"),
    ),
    Row(
        name="stop-expert",
        text="SIGSTOP of an expert worker, copies elsewhere (1 + 3)",
        limit=_FROZEN,
        attention=1,
        experts=3,
        redundant=22,
        fault=_stop("expert"),
        prepare=forget_start,
    ),
    Row(
        name="stop-attention",
        text="SIGSTOP of an attention worker (2 + 2)",
        limit=_FROZEN,
        attention=2,
        experts=2,
        fault=_stop("attention"),
        prepare=forget_start,
    ),
    Row(
        name="controller",
        text="kill -9 the controller (1 + 2)",
        limit="none",
        attention=1,
        experts=2,
        fault=Site.kill_controller,
        changes="term",
    ),
    Row(
        name="controller-expert",
        text="kill -9 the controller and an expert worker, copies elsewhere (1 + 3)",
        limit="worst 5 s",
        attention=1,
        experts=3,
        redundant=22,
        fault=_kill_both,
    ),
    Row(
        name="gateway",
        text="kill -9 a gateway of two, streams of the other (1 + 2)",
        limit="none",
        attention=1,
        experts=2,
        prepare=Site.start_second_gateway,
        fault=Site.kill_second_gateway,
        changes="",
    ),
    Row(
        name="drain-attention",
        text="drain an attention worker (2 + 2)",
        limit="-",
        attention=2,
        experts=2,
        fault=_drain("attention"),
    ),
    Row(
        name="drain-expert",
        text="drain an expert worker with the only copies (1 + 2)",
        limit="-",
        attention=1,
        experts=2,
        fault=_drain("expert"),
    ),
)
"""In the order of the table."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """How much and how often."""

    num_streams: int = 24
    """Clients."""
    num_tokens: int = 200
    """Tokens of a call, at least."""
    repetitions: int = 20
    """Faults of a row."""


QUICK = Size(num_streams=4, num_tokens=40, repetitions=1)


@dataclass(slots=True)
class Found:
    """What came of one row."""

    stalls_s: list[float]
    """By repetition."""
    calm_s: list[float]
    """Longest pause in the second before, by repetition."""
    failures: list[str]
    """Calls that failed."""
    note: str = ""
    """Why there are fewer repetitions."""


def measure(row: Row, size: Size, seed: int = 1) -> Found:
    """All repetitions of one row, on as few clusters as it takes. Needs ``connected_ray``."""
    found = Found(stalls_s=[], calm_s=[], failures=[])
    draw = random.Random(f"{row.name}/{seed}")
    while len(found.stalls_s) < size.repetitions:
        before = len(found.stalls_s)
        try:
            for _ in _repetitions(row, size, draw, found):
                if len(found.stalls_s) >= size.repetitions:
                    break
        except (TimeoutError, RuntimeError, RayError) as err:
            found.note = f"{type(err).__name__}: {err}".splitlines()[0][:120]
            logger.warning("%s: %s", row.name, found.note)
            if len(found.stalls_s) == before:
                break
    return found


def _repetitions(row: Row, size: Size, draw: random.Random, found: Found) -> Iterator[None]:
    """One cluster: a run for each repetition, until it does not come back to full size."""
    config = make_config(
        bundled_checkpoint(),
        row.attention,
        row.experts,
        workers={"num_redundant_experts": row.redundant},
        engine={"kv_cache_bytes": 64 << 20},
        transport={"detection_limit_s": DETECTION_LIMIT_S},
    )
    with serving(RayCluster(config)) as cluster:
        assert isinstance(cluster, RayCluster)
        site = Site(cluster, draw)
        with contextlib.closing(site), gateway_of(cluster) as gateway:
            load = FaultLoad(gateway, make_calls(size.num_streams, size.num_tokens))
            while True:
                with load.running():
                    _one(row, site, load, draw, found)
                found.failures += load.failures
                load.failures.clear()
                yield
                site.wake()
                if not _is_whole_again(site, row):
                    return


def _one(row: Row, site: Site, load: FaultLoad, draw: random.Random, found: Found) -> None:
    """One fault."""
    row.prepare(site)
    load.wait_deltas(3)
    time.sleep(_CALM_S + draw.uniform(0.0, 0.3))
    before = site.snapshot()
    hit_at = time.monotonic()
    row.fault(site)
    if row.changes:
        wait(
            lambda: (
                (now := site.snapshot())[row.changes] > before[row.changes]
                and now["state"] in ("SERVING", "DEGRADED")
            ),
            "the cluster to go on",
        )
    load.wait_deltas(3)
    found.stalls_s.append(load.longest_pause(hit_at))
    found.calm_s.append(load.longest_pause(hit_at - _CALM_S, hit_at - 0.1))
    logger.info("%s: %.3f s", row.name, found.stalls_s[-1])


def _is_whole_again(site: Site, row: Row) -> bool:
    """Wait until lost workers are replaced; False when that does not happen."""

    def is_whole() -> bool:
        snapshot = site.snapshot()
        serving = [w for w in snapshot["workers"] if w["state"] == "SERVING"]
        return snapshot["state"] == "SERVING" and len(serving) == row.attention + row.experts

    try:
        wait(is_whole, "replacements", _RESTORE_LIMIT_S)
    except TimeoutError:
        return False
    return True


def report(found: dict[str, Found]) -> str:
    """One line for each row."""
    head = ["fault", "asked for", "median s", "worst s", "calm s", "times", "failed calls"]
    rows = []
    for row in ROWS:
        if row.name not in found:
            continue
        mine = found[row.name]
        numbers = ["-", "-", "-"]
        if mine.stalls_s:
            calm = statistics.median(mine.calm_s)
            median, worst = statistics.median(mine.stalls_s), max(mine.stalls_s)
            numbers = [f"{median:.2f}", f"{worst:.2f}", f"{calm:.2f}"]
        times = f"{len(mine.stalls_s)}{f' ({mine.note})' if mine.note else ''}"
        rows.append([row.text, row.limit, *numbers, times, str(len(mine.failures))])
    return table(head, rows)


def section(quick: bool, rows: Sequence[Row] = ROWS, size: Size | None = None) -> str:
    """The part of ``RESULTS.md``."""
    size = size or (QUICK if quick else Size())
    found = {}
    for row in rows:
        with connected_ray():
            found[row.name] = measure(row, size)
    words = (
        f"## Reliability\n\n{size.num_streams} clients with a mix of greedy and sampled calls, "
        "penalties, stop strings and grammars, of at least "
        f"{size.num_tokens} tokens; bundled model, default settings, detection limit "
        f"{DETECTION_LIMIT_S:g} s, everything on the same cores. A stall is the longest time "
        "between two deltas of any stream around the fault; `calm` is the same in the "
        "second before it (median)."
    )
    return f"{words}\n\n{report(found)}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the section, or some rows of it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reliability")
    known = {row.name: row for row in ROWS}
    parser.add_argument("--rows", default=",".join(known), help=f"of {', '.join(known)}")
    parser.add_argument("--repetitions", type=int, help="faults of each row (20)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    options = parser.parse_args(arguments)
    names = options.rows.split(",")
    for name in names:
        if name not in known:
            parser.error(f"--rows: {name} is not one of {', '.join(known)}")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    size = QUICK if options.quick else Size()
    size = replace(size, repetitions=options.repetitions or size.repetitions)
    sys.stdout.write(section(options.quick, [known[n] for n in names], size) + "\n")


if __name__ == "__main__":
    main()
