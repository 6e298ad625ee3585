"""``RESULTS.md`` and its tables, options of several benchmarks, a quiet machine."""
