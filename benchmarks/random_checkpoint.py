"""``python -m benchmarks.random_checkpoint``: see ``benchmarks/checkpoints``."""

from benchmarks.checkpoints.random_checkpoint import main

if __name__ == "__main__":
    main()
