"""``python -m benchmarks.profile`` runs ``benchmarks/engine/profile.py``."""

import sys

from benchmarks.engine.profile import main

if __name__ == "__main__":
    sys.exit(main())
