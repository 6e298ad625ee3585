"""``python -m benchmarks.perplexity`` runs ``benchmarks/engine/perplexity.py``."""

from benchmarks.engine.perplexity import main

if __name__ == "__main__":
    main()
