"""How long streams pause when something is killed, stopped or drained: the table of faults.

python -m tests.long.reliability [--rows expert-copies,attention] [--repetitions 20] [--quick]

24 clients on a private Ray with the bundled model, default settings, detection limit 2 s. Each
repetition waits for full flow, does the fault at a random moment, and takes the longest time
between two deltas of any stream from then until all flow again. Then the load stops until
the cluster has replaced what it lost; a cluster that does not is started anew. Faults between hosts
are in ``reliability_hosts``.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ray.exceptions import RayError

from benchmarks.faults.load import FaultLoad, wait
from benchmarks.faults.site import Site
from benchmarks.harness.cluster_gateway import gateway_of
from benchmarks.harness.mixed_calls import make_calls
from benchmarks.harness.serving_cluster import RayCluster, connected_ray, serving
from cluster.launch.model_source import bundled_checkpoint
from tests.long.reliability_report import Found, lost, page_rows, report
from tests.long.reliability_rows import DETECTION_LIMIT_S, ROWS, Row

logger = logging.getLogger(__name__)

_RESTORE_LIMIT_S = 20.0
_CALM_S = 1.0


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


def measure(row: Row, size: Size, seed: int = 1) -> Found:
    """All repetitions of one row, on as few clusters as it takes. Needs ``connected_ray``."""
    found = Found()
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
    with contextlib.ExitStack() as held:
        folder = Path(held.enter_context(tempfile.TemporaryDirectory()))
        checkpoint = Path(shutil.copytree(bundled_checkpoint(), folder / "checkpoint"))
        cluster = RayCluster(row.config(checkpoint), row.classes)
        held.enter_context(serving(cluster))
        site = held.enter_context(contextlib.closing(Site(cluster, draw)))
        gateway = held.enter_context(gateway_of(cluster))
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
    row.after(site)
    found.num_lost.append(len(lost(before, site.snapshot())))
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


def measure_all(rows: Sequence[Row], size: Size) -> dict[str, Found]:
    """What came of each row, by name."""
    found = {}
    for row in rows:
        with connected_ray():
            found[row.name] = measure(row, size)
    return found


def describe(size: Size, found: Mapping[str, Found]) -> str:
    """The table, and what it was measured with."""
    words = (
        f"## Reliability\n\n{size.num_streams} clients with a mix of greedy and sampled calls, "
        "penalties, stop strings and grammars, of at least "
        f"{size.num_tokens} tokens; bundled model, default settings, detection limit "
        f"{DETECTION_LIMIT_S:g} s, everything on the same cores. A stall is the longest time "
        "between two deltas of any stream around the fault; `calm` is the same in the "
        "second before it (median); `lost` are workers that were lost or drained, fewest and most."
    )
    return f"{words}\n\n{report(ROWS, found)}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the section or some rows, and the rows for ``docs/reference/reliability.md``."""
    parser = argparse.ArgumentParser(prog="python -m tests.long.reliability")
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
    found = measure_all([known[n] for n in names], size)
    sys.stdout.write(f"{describe(size, found)}\n\n{page_rows(ROWS, found)}\n")


if __name__ == "__main__":
    main()
