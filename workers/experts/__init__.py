"""Physical experts and their kernels.

Imports ``workers.model``, ``workers.native`` and torch.
"""
