"""Compiled kernels for CPUs: C sources in ``c/``, their build, and their bindings.

Imports torch, and nothing of the project except ``workers.quantization``. ``build`` builds a
library for each instruction set, ``library`` loads the best one that this machine supports, and a
team of threads (``thread_team``) computes. Each kernel has a reference in torch, which computes if
no library can be built.
"""
