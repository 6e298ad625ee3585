"""Entry point of the installed command: Ctrl-C ends it quietly even during its imports.

Imports nothing before it runs.
"""

from __future__ import annotations

_INTERRUPTED = 130


def main() -> int:
    """Run one command and return its exit code."""
    try:
        from cluster.cli.main import main as run

        return run()
    except KeyboardInterrupt:
        return _INTERRUPTED
