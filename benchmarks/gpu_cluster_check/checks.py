"""What is measured at one running cluster, through its HTTP port and the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.prompts import random_prompts
from benchmarks.harness.server import Served, command, environment
from benchmarks.harness.stalls import wait_until

_LIMIT_S = 900.0
"""Longest run of one load, and longest time until lost workers have been replaced."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Sizes of the loads."""

    batches: tuple[int, ...] = (1, 64, 128, 256)
    """Concurrent streams of the measured decode steps."""
    prompt_tokens: int = 128
    output_tokens: int = 512
    num_prompts: int = 16
    """Prompts whose greedy tokens are compared."""
    fault_streams: int = 64
    """Concurrent streams while a worker is killed; four times as many are sent."""

    @property
    def context(self) -> int:
        """Mean tokens of context of a decode step."""
        return self.prompt_tokens + self.output_tokens // 2


TINY = Sizes(batches=(1, 4), prompt_tokens=8, output_tokens=16, num_prompts=4, fault_streams=4)
"""Enough to see that everything runs."""


def tokens(served: Served, sizes: Sizes) -> list[list[int]]:
    """Return the greedy tokens of random prompts, which are sent together."""
    prompts = random_prompts("tokens", sizes.num_prompts, sizes.prompt_tokens)
    answer = served.complete(
        prompt=prompts,
        max_tokens=sizes.output_tokens,
        temperature=0,
        ignore_eos=True,
        return_token_ids=True,
    )
    return [choice["token_ids"] for choice in answer["choices"]]


def speed(served: Served, sizes: Sizes, batch: int, folder: Path) -> dict[str, float]:
    """Return tokens a second, and the seconds for a further token of ``batch`` streams.

    All streams start together, so that the latter includes prompts of other streams. A first run
    captures the steps of this size.
    """
    for length in (sizes.output_tokens // 8, sizes.output_tokens):
        with _load(served, folder, batch, batch, sizes.prompt_tokens, length) as load:
            found = _results(load)
    return {
        "tokens_per_s": found["output_tokens_per_s"],
        "step_s": found["tpot_ms"]["median"] / 1e3,
        "ttft_s": found["ttft_ms"]["median"] / 1e3,
    }


def kill(served: Served, sizes: Sizes, role: str, folder: Path) -> dict[str, float]:
    """Kill a worker of a role while half of the streams or more run.

    Returns the numbers of requests, failed requests and recoveries, and the pause in seconds, when
    the cluster has as many workers as before.
    """
    workers = served.status()["workers"]
    chosen = next(worker for worker in workers if worker["role"] == role)
    before = _recoveries(served)
    streams = sizes.fault_streams
    with _load(
        served, folder, streams, 4 * streams, sizes.prompt_tokens, sizes.output_tokens
    ) as load:
        wait_until(
            lambda: _num_running(served) >= streams // 2 or load.poll() is not None,
            "running requests",
            _LIMIT_S,
        )
        os.kill(chosen["pid"], signal.SIGKILL)
        found = _results(load)
    wait_until(lambda: _num_serving(served) == len(workers), "a new worker", _LIMIT_S)
    after = _recoveries(served)
    return {
        "successful": found["successful"],
        "failed": found["failed"],
        "recoveries": after[0] - before[0],
        "pause_s": after[1] - before[1],
    }


def _load(
    served: Served,
    folder: Path,
    concurrency: int,
    num_prompts: int,
    prompt_tokens: int,
    output_tokens: int,
) -> subprocess.Popen[str]:
    """Start ``bench serve`` in a process of its own."""
    words = ["--url", served.http, "--json", "bench", "serve"]
    words += ["--max-concurrency", str(concurrency), "--num-prompts", str(num_prompts)]
    words += ["--random-input-len", str(prompt_tokens), "--random-output-len", str(output_tokens)]
    return subprocess.Popen(
        command(*words), stdout=subprocess.PIPE, text=True, env=environment(folder)
    )


def _results(load: subprocess.Popen[str]) -> dict[str, Any]:
    """Wait for ``bench serve`` and return its results."""
    try:
        text, _ = load.communicate(timeout=_LIMIT_S)
    finally:
        load.kill()
    results: dict[str, Any] = json.loads(text)["results"]
    return results


def _num_serving(served: Served) -> int:
    return sum(worker["state"] == "SERVING" for worker in served.status()["workers"])


def _num_running(served: Served) -> int:
    stats = [worker.get("stats") or {} for worker in served.status()["workers"]]
    return sum(int(one.get("num_requests_running", 0)) for one in stats)


def _recoveries(served: Served) -> tuple[float, float]:
    """Return the number of recoveries so far, and the seconds from detection to service."""
    samples: dict[str, float] = defaultdict(float)
    for family in served.status()["metrics"]:
        for sample, _, value in family["samples"]:
            samples[sample] += value
    return samples["recovery_stall_seconds_count"], samples["recovery_stall_seconds_sum"]
