"""Batch-invariant products and attention, for ``--deterministic``.

Imports ``workers.model``.
"""
