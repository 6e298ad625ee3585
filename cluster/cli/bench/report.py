"""The page that ``--report`` writes: one HTML file with charts, which needs nothing else."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from cluster.cli.bench.document import numbers_of
from cluster.cli.bench.svg import Line, line_chart
from cluster.cli.bench.tally import MEASURES
from cluster.cli.terminal.exit_codes import CommandError, ExitCode
from cluster.cli.terminal.output import save

TEMPLATE = Path(__file__).with_name("report_page.html")
_MOST_SHARE = 0.995
"""Where a chart of a distribution ends: the slowest requests would squeeze the rest."""
_SERIES = (
    ("Output tokens per second", "output_tokens_per_s", "tokens/s"),
    ("Requests that ended, per second", "requests_per_s", "requests/s"),
    ("Mean time to first token, by the time of sending", "ttft_ms", "ms"),
)
_TITLES = {
    "ttft": "Time to first token (TTFT)",
    "tpot": "Time per output token (TPOT)",
    "itl": "Inter-token latency (ITL)",
    "e2e": "End-to-end latency",
}

Document = Mapping[str, Any]


def add_report(parser: argparse.ArgumentParser) -> None:
    """Add ``--report``."""
    text = "write a page with charts: one HTML file"
    parser.add_argument("--report", type=Path, metavar="FILE.html", help=text)


def write_report(args: argparse.Namespace, runs: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the page of these documents of ``bench serve`` where that is asked for.

    Raises ``CommandError`` for documents without charts.
    """
    if args.report is None:
        return
    if not all("series" in run for run in runs.values()):
        raise CommandError(ExitCode.REFUSED, "a report needs documents of bench serve")
    save(args.report, report(runs))


def report(runs: Mapping[str, Document]) -> str:
    """The page for one run or several, by name: documents of ``bench serve``."""
    names = list(runs)
    title = f"Load test of {' and '.join(names)}"
    body = [
        _table("Results", names, [dict(numbers_of(run["results"])) for run in runs.values()]),
        *_over_time(runs),
        *_distributions(runs),
        _table("Settings", names, [{"url": run["url"], **run["options"]} for run in runs.values()]),
    ]
    page = TEMPLATE.read_text(encoding="utf-8").replace("{{title}}", escape(title))
    return page.replace("{{body}}", "\n".join(body))


def _table(title: str, names: Sequence[str], columns: Sequence[Mapping[str, Any]]) -> str:
    keys = list(dict.fromkeys(key for column in columns for key in column))
    rows = [[key, *(_cell(column.get(key)) for column in columns)] for key in keys]
    head = "".join(f"<th>{escape(name)}</th>" for name in ("", *names))
    lines = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    table = f"<table>\n<tr>{head}</tr>\n{body}\n</table>"
    return f'<h2>{escape(title)}</h2>\n<div class="scroll">{table}</div>'


def _cell(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else "-" if value is None else str(value)


def _over_time(runs: Mapping[str, Document]) -> Iterator[str]:
    for title, key, unit in _SERIES:
        lines = [
            Line(name, tuple(_points(run["series"]["bin_s"], run["series"][key])))
            for name, run in runs.items()
        ]
        yield from _chart(title, lines, "seconds", unit)


def _points(bin_s: float, values: Sequence[float | None]) -> Iterator[tuple[float, float]]:
    """A point in the middle of each bin that has a value."""
    for index, value in enumerate(values):
        if value is not None:
            yield (index + 0.5) * bin_s, value


def _distributions(runs: Mapping[str, Document]) -> Iterator[str]:
    for measure in MEASURES:
        lines = [
            Line(name, tuple(_shares(run["distributions_ms"][measure])))
            for name, run in runs.items()
        ]
        yield from _chart(_TITLES[measure], lines, "milliseconds", "% that do not exceed it")


def _shares(curve: Sequence[Sequence[float]]) -> Iterator[tuple[float, float]]:
    for place, (value, share) in enumerate(curve):
        if place == 0 or share <= _MOST_SHARE or len(curve) <= 2:
            yield value, 100 * share


def _chart(title: str, lines: Sequence[Line], x: str, y: str) -> Iterator[str]:
    shown = [line for line in lines if line.points]
    if shown:
        yield f"<h2>{escape(title)}</h2>\n{line_chart(shown, x, y)}"
