"""Data of the bundled demo checkpoint, which ``benchmarks/demo_model`` trained. No imports."""
