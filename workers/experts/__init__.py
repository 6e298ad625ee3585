"""Physical experts and their kernels.

Imports ``workers.model`` and torch.
"""
