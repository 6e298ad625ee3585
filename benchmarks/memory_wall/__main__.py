"""``python -m benchmarks.memory_wall`` runs ``benchmarks/memory_wall/table.py``."""

import sys

from benchmarks.memory_wall.table import main

if __name__ == "__main__":
    sys.exit(main())
