"""The exit code of a command line, also where the parser ends the process."""

from __future__ import annotations

from cluster.cli.main import main


def exit_code(*words: str) -> int | str | None:
    try:
        return main(words)
    except SystemExit as err:
        return err.code
