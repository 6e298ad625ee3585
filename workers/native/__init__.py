"""Compiled kernels for CPUs: C sources in ``c/``, their build, and their bindings.

Imports torch, and nothing of the project except ``workers.quantization``. A library is built for
each instruction set (``build``), the best one that this machine supports is loaded (``library``),
and a team of threads computes (``team``). Each kernel has a reference in torch, which is used if no
library can be built.
"""
