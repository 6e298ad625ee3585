"""Kernels for CUDA in Triton, each with what launches it, and CUDA graphs.

Triton comes with CUDA builds of torch for Linux. All modules of this folder but ``step_graph``
import it at once, so others import them where a tensor is on a GPU, and not before. Without a GPU,
Triton's interpreter runs the same kernels in tests (``TRITON_INTERPRET=1``, set before Triton is
imported).

May import nothing of ours.
"""
