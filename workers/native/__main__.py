"""``python -m workers.native``: build the kernels for this machine and print the selected ones.

``make setup`` runs it. The exit status is 1 if there are no kernels, so that torch computes.
"""

from __future__ import annotations

import sys

from workers.native.library import find_library


def main() -> int:
    """Build the kernels and return the exit status."""
    found = find_library()
    sys.stdout.write(f"{found.description}\n")
    return 0 if found.library is not None else 1


if __name__ == "__main__":
    sys.exit(main())
