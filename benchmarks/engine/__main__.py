"""``python -m benchmarks.engine`` runs ``benchmarks/engine/batches.py``."""

import sys

from benchmarks.engine.batches import main

if __name__ == "__main__":
    sys.exit(main())
