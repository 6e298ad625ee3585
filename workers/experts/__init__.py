"""Physical experts (copies of experts in a worker's slots) and their kernels.

Imports ``workers.model``, ``workers.native`` and torch.
"""
