"""``python -m benchmarks.engine_codec`` runs ``benchmarks/engine/engine_codec.py``."""

from benchmarks.engine.engine_codec import main

if __name__ == "__main__":
    main()
