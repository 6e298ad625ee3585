"""A model on a CPU with native kernels.

Imports ``workers.model`` and ``workers.native``.
"""
