"""Parts of a model on a CPU, computed with native kernels.

Imports ``workers.model`` and ``workers.native``.
"""
