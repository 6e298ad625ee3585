"""The process of one section: ``python -m benchmarks.gpu_check.child`` with arguments of ``main``.

Lines of JSON on stdout are what it finds; whatever else is printed goes to stderr.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from benchmarks.gpu_check.section import Place, Report

DONE = '{"done": true}\n'
"""The last line of a section that ended by itself."""


def main(function: str, device: str, limit_s: str, is_tiny: str, folder: str) -> None:
    """Run the section."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries write to stdout must not end up among the answers

    def write(line: str) -> None:
        answers.write(line)
        answers.flush()

    report = Report(write)
    module, name = function.split(":")
    with report.part("section"):
        run: Callable[[Place, Report], None] = getattr(import_module(module), name)
        place = Place(
            device_name=device,
            limit_s=float(limit_s),
            folder=Path(folder),
            is_tiny=is_tiny == "True",
        )
        run(place, report)
    sys.stdout.flush()  # this process may be ended as soon as it is done
    write(DONE)


if __name__ == "__main__":
    main(*sys.argv[1:])
