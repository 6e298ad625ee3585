"""Decoding streams while long prompts arrive, with one step group, with two, and with two that have
experts of their own.

    python -m benchmarks.simulated.step_groups [--json]

Real clusters of as many paced workers (``benchmarks.simulated.serving``) serve the same
requests: streams that decode, alone at first, and then beside prompts that arrive one after
another. Each prompt has a few output tokens. With two groups, the time from its first token to the
second contains its hand-over.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.harness.cluster_gateway import ClusterGateway, gateway_of
from benchmarks.harness.serving_cluster import ThreadCluster, make_config, serving
from benchmarks.serving.throughput import TINY, random_model
from benchmarks.simulated.serving import DEVICE, Pace, PacedCluster, make_call
from cluster.cli.terminal.arguments import count
from cluster.cli.terminal.output import table
from cluster.launch.checkpoint_check import CheckpointCheck
from cluster.sizing.mixed_step import PoolSizes, RankRows, StepTimes
from cluster.sizing.roofline import ModelSize
from cluster.workload.arrivals import Arrival

MODEL = replace(TINY, experts=16, top_k=4, max_positions=8448)
LENGTHS = (250, 1000, 8000)
"""Tokens of the prompts."""
NUM_STREAMS = 8
_STREAM = Arrival(0.0, 16, 4000)
_NUM_ALONE = 40
"""Tokens of each stream before the first prompt."""
_NUM_NEW = 8
"""Output tokens of a prompt."""
_ENGINE: dict[str, Any] = {
    "max_num_seqs": 16,
    "max_num_batched_tokens": 256,
    "kv_cache_bytes": 256 << 20,
}
_GROUPS: dict[str, Any] = {
    "num_attention_workers": None,
    "num_prefill_workers": 1,
    "num_decode_workers": 1,
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "2 attention": {},
    "1 prefill + 1 decode": _GROUPS,
    "the same, own experts": {**_GROUPS, "share_experts": "no"},
}
"""Options of the layouts; each has two expert workers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """Times of one run, in milliseconds."""

    layout: str
    prompt_tokens: int
    alone_ms: float
    """Median time between tokens of the streams before the prompts."""
    beside_ms: float
    """The same while prompts are computed."""
    slow_ms: float
    """The 99th percentile while prompts are computed."""
    ttft_ms: float
    """Median time to the first token of a prompt."""
    second_ms: float
    """Median time from the first token of a prompt to the second."""

    def columns(self) -> list[str]:
        """Return a row of the table, with times of the streams divided by those before."""
        alone = self.alone_ms
        ratios = (self.beside_ms / alone, self.slow_ms / alone, self.second_ms / alone)
        times = f"{alone:.1f}", *(f"{ratio:.2f}" for ratio in ratios), f"{self.ttft_ms:.0f}"
        return [self.layout, str(self.prompt_tokens), *times]


class _WithoutContext(StepTimes):
    """Times of steps without reads of the KV cache, so that streams keep their pace."""

    def attention_s(self, rank: RankRows, model: ModelSize, m: int = 1) -> float:
        return super().attention_s(rank._replace(context_tokens=0), model, m)


def serve(gateway: ClusterGateway, layout: str, length: int, number: int) -> Found:
    """Serve the streams, and ``number`` prompts of ``length`` tokens beside them."""
    prompts: list[list[float]] = []
    began: list[float] = []

    async def run() -> None:
        for place in range(number):
            began.append(time.monotonic())
            call = make_call(Arrival(0.0, length, _NUM_NEW), NUM_STREAMS + place)
            answer = await gateway.serve(call, f"prompt-{layout}-{length}-{place}")
            prompts.append(answer.times)

    calls = [make_call(_STREAM, place) for place in range(NUM_STREAMS)]
    streams = gateway.stream(calls, f"stream-{layout}-{length}")
    while min(len(answer.times) for answer in streams.answers) < _NUM_ALONE:
        time.sleep(0.01)
    gateway.run(run())
    assert streams.ends is not None
    assert not streams.ends.done(), "the streams must outlast the prompts"
    streams.ends.cancel()
    ended = prompts[-1][0]
    alone, beside = list[float](), list[float]()
    for answer in streams.answers:
        for before, after in pairwise(answer.times):
            if after < began[0]:
                alone.append(after - before)
            elif after < ended:
                beside.append(after - before)
    return Found(
        layout=layout,
        prompt_tokens=length,
        alone_ms=1e3 * statistics.median(alone),
        beside_ms=1e3 * statistics.median(beside),
        slow_ms=1e3 * sorted(beside)[len(beside) * 99 // 100],
        ttft_ms=1e3 * statistics.median(t[0] - b for t, b in zip(prompts, began, strict=True)),
        second_ms=1e3 * statistics.median(times[1] - times[0] for times in prompts),
    )


def measure(checkpoint: Path, layout: str, lengths: Sequence[int], number: int) -> Iterator[Found]:
    """Yield the times of each length of prompts on a new cluster."""
    facts = CheckpointCheck(checkpoint, os.environ).result()
    config = make_config(checkpoint, 2, 2, engine=_ENGINE, workers=LAYOUTS[layout])
    cluster = ThreadCluster(config)
    with serving(cluster), gateway_of(cluster) as gateway:
        model = facts.size("auto", None)
        pools = PoolSizes(num_attention=2, num_experts=2)
        pace = Pace(DEVICE, model, _WithoutContext(model, pools, DEVICE))
        PacedCluster(cluster, gateway, pace)
        for length in lengths:
            yield serve(gateway, layout, length, number)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulated.step_groups")
    parser.add_argument("--lengths", type=count, nargs="+", default=LENGTHS, metavar="TOKENS")
    parser.add_argument("--prompts", type=count, default=5, metavar="N", help="of a length (5)")
    parser.add_argument("--layouts", choices=LAYOUTS, nargs="+", help="by default all")
    parser.add_argument("--json", action="store_true", help="print a JSON object for each row")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure both layouts, and print a row for each length."""
    args = make_parser().parse_args(arguments)
    rows = []
    with random_model(MODEL) as checkpoint:
        for layout in args.layouts or LAYOUTS:
            for found in measure(checkpoint, layout, args.lengths, args.prompts):
                if args.json:
                    print(json.dumps(asdict(found)), flush=True)
                rows.append(found.columns())
    if not args.json:
        heads = ["LAYOUT", "PROMPT", "ITL MS", "ITL BESIDE", "P99 BESIDE", "2ND TOKEN", "TTFT MS"]
        sys.stdout.write(table(heads, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
