"""Runs batches on the local engine, without a server or Ray."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.harness.local_engine import LocalEngine
from benchmarks.harness.prompts import random_prompts
from cluster.cli.options.option import parse_bytes
from cluster.cli.terminal.arguments import count
from cluster.cli.terminal.output import note
from cluster.config.cluster import EngineSection
from cluster.core.errors import CheckpointError
from cluster.launch.model_source import ModelSource, find_model
from workers.dispatch.dispatcher import TokenDispatcher
from workers.requests.request import Request, SamplingParams

WARM_UP_TOKENS = 2
"""New tokens of each sequence in a warm-up batch."""


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``benchmarks.engine.batches`` and ``benchmarks.engine.profile``."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="folder or hub id (the bundled)")
    for name, default in (("input", 128), ("output", 64)):
        parser.add_argument(
            f"--{name}-len", type=count, default=default, metavar="N", help=f"tokens ({default})"
        )
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="compute type"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where it runs (auto)"
    )
    parser.add_argument(
        "--threads", type=count, metavar="N", help="of a CPU (the cores that this process may use)"
    )
    parser.add_argument(
        "--kv-cache-bytes", type=parse_bytes, metavar="B", help="KV memory, 2G say (as serve)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the prompts (0)")


def options_of(args: argparse.Namespace, engine: LocalEngine) -> dict[str, Any]:
    """Settings for the document: requested values, and the values that ``auto`` resolved to."""
    names = ("input_len", "output_len", "kv_cache_bytes", "seed")
    return {
        "model": source_of(args).name,
        **{name: getattr(args, name) for name in names},
        "dtype": str(engine.dtype).removeprefix("torch."),
        "device": _device(args),
        "threads": args.threads or _cores(),
    }


def source_of(args: argparse.Namespace) -> ModelSource:
    """Path of the checkpoint. Raises ``SystemExit`` with the reason."""
    try:
        return find_model(args.model, note)
    except CheckpointError as err:
        raise SystemExit(str(err)) from err


def open_engine(
    args: argparse.Namespace,
    batch: int,
    wrap: Callable[[TokenDispatcher], TokenDispatcher] | None = None,
) -> LocalEngine:
    """Open the engine of a checkpoint for batches of up to ``batch`` sequences.

    Raises ``SystemExit`` with the reason.
    """
    source = source_of(args)
    note(f"loading {source.name}")
    default = EngineSection()
    section = EngineSection(
        kv_cache_bytes=args.kv_cache_bytes,
        max_num_seqs=max(batch, default.max_num_seqs),
        max_num_batched_tokens=max(batch, default.step_tokens),
        max_waiting=max(batch, default.max_waiting),
        enable_prefix_caching=False,
    )
    device = _device(args)
    try:
        engine = LocalEngine(
            source.folder,
            dtype=args.dtype,
            device=device,
            section=section,
            num_threads=args.threads or _cores(),
            wrap=wrap,
        )
    except CheckpointError as err:
        raise SystemExit(str(err)) from err
    _check_room(args, engine, batch, section.block_size_tokens)
    return engine


def _check_room(args: argparse.Namespace, engine: LocalEngine, batch: int, block: int) -> None:
    tokens, limit = args.input_len + args.output_len, engine.engine.max_model_len
    if tokens > limit:
        message = f"{tokens} tokens of prompt and answer are above the model's limit of {limit}"
        raise SystemExit(message)
    needed, there = batch * -(-tokens // block), engine.engine.pool.num_blocks
    if needed > there:
        message = f"batch {batch} needs {needed} KV blocks, there are {there}: --kv-cache-bytes"
        raise SystemExit(message)


@contextmanager
def threads_kept() -> Iterator[None]:
    """Restore torch's number of threads after the block, as the engine changes it."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def prompts(args: argparse.Namespace, engine: LocalEngine, batch: int) -> list[list[int]]:
    """Prompts of random tokens, equal for equal seed and batch."""
    return random_prompts(f"{args.seed} {batch}", batch, args.input_len, engine.config.vocab_size)


def run_batch(
    engine: LocalEngine,
    batch: Sequence[Sequence[int]],
    new_tokens: int,
    after_step: Callable[[], None] = lambda: None,
) -> list[list[float]]:
    """Run a batch; returns seconds to each token of each sequence. Raises ``RuntimeError``."""
    params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
    times: Mapping[str, list[float]] = {str(i): [] for i in range(len(batch))}
    start = time.perf_counter()
    for name, prompt in zip(times, batch, strict=True):
        engine.add_request(Request(request_id=name, prompt=tuple(prompt), params=params))
    while engine.engine.has_work:
        outputs = engine.step()
        after_step()
        now = time.perf_counter() - start
        for output in outputs:
            if output.error:
                raise RuntimeError(output.error)
            times[output.request_id].extend([now] * len(output.token_ids))
    return list(times.values())


def _device(args: argparse.Namespace) -> str:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch finds no GPU")
    if args.device != "auto":
        return str(args.device)
    return "cuda" if torch.cuda.is_available() else "cpu"


def _cores() -> int:
    return len(os.sched_getaffinity(0))
