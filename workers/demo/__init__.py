"""The bundled demo checkpoint, as data. ``benchmarks/demo_model`` trained it."""
