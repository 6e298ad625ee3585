"""``python -m benchmarks.fan_out`` runs ``benchmarks/faults/fan_out.py``."""

from benchmarks.faults.fan_out import main

if __name__ == "__main__":
    main()
