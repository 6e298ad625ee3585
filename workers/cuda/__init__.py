"""Triton kernels for CUDA with their launch functions, and CUDA graphs.

Triton comes with CUDA builds of torch for Linux. All modules of this folder except ``step_graph``
import Triton when they are imported, so other packages import them only when a tensor is on a GPU.
Without a GPU, Triton's interpreter runs the same kernels in tests (``TRITON_INTERPRET=1``, set
before Triton is imported).

Imports no other package of the project.
"""
