"""``python -m benchmarks.peers`` runs ``benchmarks/peers/comparison.py``."""

import sys

from benchmarks.peers.comparison import main

if __name__ == "__main__":
    sys.exit(main())
