"""``python -m benchmarks.placement_speed`` runs ``benchmarks/placement/speed.py``."""

from benchmarks.placement.speed import main

if __name__ == "__main__":
    main()
