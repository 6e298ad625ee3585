"""Reads checkpoints (Hugging Face folders): tensors by name and slice.

Imports ``workers.model``, ``workers.model.batch_invariant`` and ``workers.model.families``.
"""
