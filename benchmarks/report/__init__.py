"""Pages and tables of ``docs/results``, options of several benchmarks, a quiet machine."""
