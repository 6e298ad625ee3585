"""Options that several benchmarks take."""

from __future__ import annotations

import argparse

from cluster.cli.bench.document import add_save
from cluster.cli.terminal.arguments import count


def add_output(parser: argparse.ArgumentParser) -> None:
    """Add ``--json`` and ``--save``; ``cluster.cli.bench.document.tell`` reads them."""
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    add_save(parser)


def counts(text: str) -> tuple[int, ...]:
    """``1,8,32``, each once, ascending. Raises ``ArgumentTypeError``."""
    return tuple(sorted({count(word.strip()) for word in text.split(",")}))
