"""Entry point of the installed command: Ctrl-C ends it quietly even while its modules are imported.

Imports nothing before it runs.
"""

from __future__ import annotations

_INTERRUPTED = 130


def main() -> int:
    """Run one command; its exit code."""
    try:
        from cluster.cli.main import main as run

        return run()
    except KeyboardInterrupt:
        return _INTERRUPTED
