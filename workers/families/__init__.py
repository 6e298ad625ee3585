"""One module per model family: config, tensors, attention, router, expert banks.

Imports torch and the engine's building blocks.
"""
