"""Reading checkpoints: tensors by name and slice.

Imports ``workers.model`` and ``workers.model.batch_invariant``.
"""
