"""The bundled demo checkpoint, as data without imports. ``benchmarks/demo_model`` trained it."""
