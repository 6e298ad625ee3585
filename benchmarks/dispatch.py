"""``python -m benchmarks.dispatch`` runs ``benchmarks/engine/dispatch.py``."""

import sys

from benchmarks.engine.dispatch import main

if __name__ == "__main__":
    sys.exit(main())
