"""Which groups of GPUs a model needs: ``docs/reference/sizing.md``."""
