"""All combinations of options, each against one process: ``python -m tests.long.matrix``.

No speed is measured. ``--pairs`` runs the few combinations that ``make test`` runs too.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.fakes import write_tiny_checkpoint
from tests.harness.option_matrix import Choice, all_choices, check, describe, pairwise

logger = logging.getLogger(__name__)


def run(choices: Sequence[Choice]) -> list[str]:
    """Serve every combination; what failed, in words."""
    failures = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder)
        write_tiny_checkpoint(checkpoint)
        for number, choice in enumerate(choices, start=1):
            start = time.monotonic()
            outcome = "ok"
            try:
                check(choice, checkpoint)
            except Exception as err:  # whatever goes wrong with one, the others are run
                outcome = f"{type(err).__name__}: {err}"
                failures.append(f"{describe(choice)}: {outcome}")
            took = time.monotonic() - start
            logger.info(
                "%d/%d %s %.1f s: %s", number, len(choices), describe(choice), took, outcome
            )
    return failures


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 0 when every combination gives the same answers."""
    parser = argparse.ArgumentParser(prog="python -m tests.long.matrix", description=__doc__)
    parser.add_argument("--pairs", action="store_true", help="a few that have every pair of values")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    logger.setLevel(logging.INFO)
    choices = list(all_choices())
    if options.pairs:
        choices = pairwise(choices)
    failures = run(choices)
    logger.info("%d combinations, %d failed", len(choices), len(failures))
    for failure in failures:
        sys.stdout.write(failure + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
