"""Entry point of the installed command. Ctrl-C ends it without a traceback, even during imports.

Imports only the standard library before the command runs.
"""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder
from pathlib import Path

_INTERRUPTED = 130
_USAGE = 2
_PACKAGES = ("cluster", "workers", "gateway", "protos")


def main() -> int:
    """Run one command and return its exit code."""
    if problem := find_shadow(Path(__file__).parents[2]):
        sys.stderr.write(f"expertmesh: {problem}\n")
        return _USAGE
    try:
        from cluster.cli.main import main as run

        return run()
    except KeyboardInterrupt:
        return _INTERRUPTED


def find_shadow(root: Path) -> str:
    """Return an error text if ``python -m`` would not import a package from ``root``.

    ``python -m`` searches the working directory first. Returns an empty text if all is well.
    """
    for name in _PACKAGES:
        spec = PathFinder.find_spec(name, [str(Path.cwd()), *sys.path])
        if spec is None or spec.origin is None:
            continue
        place = Path(spec.origin).resolve()
        if not place.is_relative_to(root / name):
            hint = "rename it, or run expertmesh in another folder"
            return f"{place} hides the package {name} of expertmesh ({root}): {hint}"
    return ""
