"""Speed of the engine in one process by batch size: ``python -m benchmarks.engine [MODEL]``."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence

from benchmarks.harness import local_runs
from benchmarks.report.options import add_output, counts
from benchmarks.report.timing import decode_interval_of
from cluster.cli.bench.document import document_of, format_number, show_and_save
from cluster.cli.terminal.arguments import count
from cluster.cli.terminal.output import note, table

BATCHES = (1, 8, 32)
NUMBERS = ("prefill_tokens_per_s", "decode_tokens_per_s", "itl_ms")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=__doc__)
    local_runs.add_engine_options(parser)
    parser.add_argument(
        "--batch", type=counts, default=BATCHES, metavar="B,B", help="sequences (1,8,32)"
    )
    parser.add_argument(
        "--repeats", type=count, default=3, metavar="N", help="medians of so many runs (3)"
    )
    add_output(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every batch and print its rates."""
    args = make_parser().parse_args(arguments)
    with local_runs.threads_kept():
        engine = local_runs.open_engine(args, max(args.batch))
        found = {}
        for batch in args.batch:
            note(f"batch {batch}")
            mine = local_runs.prompts(args, engine, batch)
            local_runs.run_batch(engine, mine, local_runs.WARM_UP_TOKENS)
            runs = [
                local_runs.run_batch(engine, mine, args.output_len) for _ in range(args.repeats)
            ]
            found[str(batch)] = _medians([_rates(times, args.input_len) for times in runs])
        options = {**local_runs.options_of(args, engine), "repeats": args.repeats}
    document = document_of("benchmarks.engine", options, {"batches": found})
    rows = [
        (batch, *(format_number(rates[name]) for name in NUMBERS)) for batch, rates in found.items()
    ]
    show_and_save(
        args, document, table(("BATCH", "PREFILL TOKENS/S", "DECODE TOKENS/S", "ITL MS"), rows)
    )
    return 0


def _rates(times: Sequence[Sequence[float]], input_len: int) -> dict[str, float | None]:
    """Rates of one run: prefill until the last first token, then decode while all decode."""
    interval = decode_interval_of(times)
    prefill = len(times) * input_len / interval.begin_s
    return dict(zip(NUMBERS, (prefill, interval.tokens_per_s, interval.median_gap_ms), strict=True))


def _medians(runs: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Median of each rate; None if it could not be measured."""
    found: dict[str, float | None] = {}
    for name in NUMBERS:
        values = [value for rates in runs if (value := rates[name]) is not None]
        found[name] = statistics.median(values) if values else None
    return found
