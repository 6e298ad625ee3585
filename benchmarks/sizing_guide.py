"""``python -m benchmarks.sizing_guide`` runs ``benchmarks/sizing/guide.py``."""

from benchmarks.sizing.guide import main

if __name__ == "__main__":
    main()
