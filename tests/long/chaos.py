"""Faults and orders at random under mixed traffic, and whether any client notices.

python -m tests.long.chaos [--seed 1] [--minutes 10] [--every 5]

``expertmesh serve`` with the bundled model, 2 attention and 2 expert workers, 2 gateways. Clients
(``tests.long.chaos_clients``) ask for answers that are known from before the first fault. Meanwhile
workers, the controller and gateways are killed, workers and the controller are stopped for
seconds, and the cluster is scaled, drained and rebalanced
(``tests.long.chaos_faults``). One seed decides the faults and the requests.

A whole answer must have the known tokens, and a broken one their beginning. Calls may break where a
gateway was killed, and only there. Ends with status 1 where that does not hold, where
a worker that nothing has hit ends by an error of its own, or where something is left afterwards.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.server import Served, running_server
from benchmarks.report.results import table
from tests.long.chaos_clients import Clients, Seen
from tests.long.chaos_faults import Chaos

_DETECTION_LIMIT_S = 2.0
"""As shipped; other tests have a longer one."""
_MOST_LINES = 20
"""Of what is wrong."""
_LAYOUT = (
    *("--num-attention-workers", "2", "--num-expert-workers", "2"),
    *("--num-redundant-experts", "8", "--num-gateway-replicas", "2"),
    *("--detection-limit-s", f"{_DETECTION_LIMIT_S:g}"),
    *("--kv-host-bytes", "64M"),
)


async def run(server: Served, seed: int, minutes: float, every_s: float) -> list[str]:
    """Learn the answers, then let faults happen under load.

    Returns the lines of the report; the last one begins with ``Result``.
    """
    clients = Clients(server, seed)
    await clients.learn()
    chaos = Chaos(server, seed, clients.seen)
    end = time.monotonic() + 60.0 * minutes
    load = asyncio.create_task(clients.run(lambda: time.monotonic() >= end))
    while time.monotonic() < end - every_s:
        await asyncio.sleep(chaos.pause_s(every_s))
        await asyncio.to_thread(chaos.one)
    await load
    left = await asyncio.to_thread(chaos.wait_calm)
    operations = await asyncio.to_thread(chaos.operations)
    await clients.close()
    return report(clients.seen, chaos, operations, left)


def report(seen: Seen, chaos: Chaos, operations: Counter[str], left: Sequence[str]) -> list[str]:
    """What clients saw and what happened; the last line is the result."""
    unexplained = chaos.unexplained()
    own_errors = [line for line in unexplained if "Error" in line]
    wrong = [*seen.wrong, *left, *own_errors][:_MOST_LINES]
    ends = ", ".join(f"{count} {name}" for name, count in sorted(operations.items()))
    lines = [
        _counts(["requests", "number"], seen.outcomes),
        _counts(["faults and orders", "number"], chaos.done),
        _counts(["changes of the cluster", "number"], chaos.changes()),
        f"Operations that are remembered: {ends}.",
        _pauses(seen.pauses_ms),
        f"Losses that no fault explains: {'; '.join(unexplained) or 'none'}.",
        *wrong,
    ]
    tokens = ", ".join(f"{seen.tokens[how]} {how}" for how in ("lost", "altered", "duplicated"))
    is_good = not (wrong or seen.num_failed)
    result = (
        f"Result: {'good' if is_good else 'BAD'}: {seen.outcomes.total()} requests, "
        f"{seen.num_failed} failed; tokens: {tokens}; left: {'; '.join(left) or 'nothing'}."
    )
    return [*lines, result]


def _counts(head: Sequence[str], counts: Counter[str]) -> str:
    return table(list(head), [[name, str(count)] for name, count in sorted(counts.items())])


def _pauses(pauses_ms: Sequence[float]) -> str:
    known = sorted(pauses_ms) or [0.0]
    share = {q: known[min(int(q * len(known)), len(known) - 1)] for q in (0.5, 0.9, 0.99)}
    return (
        f"Longest pause of a stream in ms, of {len(pauses_ms)} streams: median {share[0.5]:.0f}, "
        f"90% {share[0.9]:.0f}, 99% {share[0.99]:.0f}, longest {known[-1]:.0f}, "
        f"mean {statistics.mean(known):.0f}."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 1 where anything is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.long.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--every", type=float, default=5.0, help="mean seconds between two faults")
    options = parser.parse_args(arguments)
    with (
        tempfile.TemporaryDirectory(prefix="em") as folder,
        running_server(Path(folder), *_LAYOUT) as server,
    ):
        lines = asyncio.run(run(server, options.seed, options.minutes, options.every))
    sys.stdout.write("\n\n".join(lines) + "\n")
    return 0 if lines[-1].startswith("Result: good") else 1


if __name__ == "__main__":
    sys.exit(main())
