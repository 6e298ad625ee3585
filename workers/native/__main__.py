"""Build the CPU kernels for this machine and print the selected ones: ``python -m workers.native``.

``make setup`` runs this module. The exit status is 1 if there are no kernels, so that torch
computes.
"""

from __future__ import annotations

import sys

from workers.native.library import find_library


def main() -> int:
    """Build the CPU kernels, print their description, and return the exit status: 1 if there are
    none."""
    found = find_library()
    sys.stdout.write(f"{found.description}\n")
    return 0 if found.library is not None else 1


if __name__ == "__main__":
    sys.exit(main())
