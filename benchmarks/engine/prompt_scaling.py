"""Prompt tokens a second by attention workers: ``python -m benchmarks.engine.prompt_scaling``.

Clusters with 1, 2 and 4 attention workers and one expert worker compute equal numbers of prompts on
each attention worker, while another request decodes. On a laptop all workers share the same cores,
so each attention worker takes a given time for each row, as a device of its own would; what it
computes faster, it waits. The expert worker computes at its own speed, which is much faster with
the small random model.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

from benchmarks.harness.engine_stream import EngineStream
from benchmarks.harness.serving_cluster import ThreadCluster, make_config, serving
from benchmarks.serving.throughput import TINY, random_model
from cluster.cli.terminal.arguments import count
from cluster.cli.terminal.output import table
from workers.engine.model_runner import ModelRunner
from workers.requests.request import Request, SamplingParams

WORKERS = (1, 2, 4)
_ROW_S = 1e-3
"""Seconds that an attention worker takes for a row."""
_STEP_TOKENS = 128
_PROMPT_TOKENS = 512
_ENDLESS = SamplingParams(max_tokens=100_000, temperature=0.0, ignore_eos=True)
_ONE = SamplingParams(max_tokens=1, temperature=0.0)


def tokens_per_s(checkpoint: Path, num_attention: int, num_prompts: int) -> float:
    """Return the prompt tokens a second of all attention workers, with prompts for each of them."""
    engine = {
        "max_num_batched_tokens": _STEP_TOKENS,
        "kv_cache_bytes": 64 << 20,
        "enable_prefix_caching": False,
    }
    cluster = ThreadCluster(make_config(checkpoint, num_attention, 1, engine=engine))
    with serving(cluster):
        for rank in range(num_attention):
            _pace(cluster.group.attention(f"attention-{rank}").engine.runner)
        streams = [cluster.stream(rank) for rank in range(num_attention)]
        streams[0].send(Request(request_id="decoding", prompt=(5, 6, 7), params=_ENDLESS))
        streams[0].next()
        prompts = [_prompts(rank, num_prompts) for rank in range(num_attention)]
        began = time.monotonic()
        for stream, requests in zip(streams, prompts, strict=True):
            for request in requests:
                stream.send(request)
        for stream in streams:
            _await(stream, num_prompts)
        took_s = time.monotonic() - began
        for stream in streams:
            stream.close()
    return num_attention * num_prompts * _PROMPT_TOKENS / took_s


def _pace(runner: ModelRunner) -> None:
    """Let a step of an attention worker take ``_ROW_S`` for each of its rows."""
    run: Callable[..., Any] = runner.run

    @wraps(run)
    def paced(header: Any, plan: Any, **more: Any) -> Any:
        began = time.monotonic()
        result = run(header, plan, **more)
        time.sleep(max(began + _ROW_S * plan.num_rows - time.monotonic(), 0.0))
        return result

    runner.run = paced  # type: ignore[method-assign]


def _prompts(rank: int, num_prompts: int) -> list[Request]:
    return [
        Request(
            request_id=f"prompt-{rank}-{number}",
            prompt=tuple((rank + 7 * number + i) % 500 + 4 for i in range(_PROMPT_TOKENS)),
            params=_ONE,
        )
        for number in range(num_prompts)
    ]


def _await(stream: EngineStream, num_prompts: int) -> None:
    """Wait for the ends of all prompts of a stream."""
    ended: set[str] = set()
    while len(ended) < num_prompts:
        output = stream.next()
        if output.finish_reason is not None:
            ended.add(output.request_id)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine.prompt_scaling")
    parser.add_argument("--workers", type=count, nargs="+", default=WORKERS, metavar="N")
    parser.add_argument("--prompts", type=count, default=8, metavar="N", help="of each worker (8)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print a row for each number of attention workers."""
    args = make_parser().parse_args(arguments)
    with random_model(TINY) as checkpoint:
        found = [tokens_per_s(checkpoint, number, args.prompts) for number in args.workers]
    rows = [
        [number, f"{speed:.0f}", f"{speed / found[0]:.2f}"]
        for number, speed in zip(args.workers, found, strict=True)
    ]
    sys.stdout.write(table(["ATTENTION WORKERS", "PROMPT TOKENS/S", "RATIO"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
