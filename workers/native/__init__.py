"""Compiled kernels for CPUs: C sources in ``c/``, their build, and their bindings.

Imports torch and nothing of ours. A library is built for each instruction set (``build``), the best
one that this machine runs is loaded (``library``), and a team of threads computes (``team``). Each
kernel has a reference in torch, which computes where no library can be built.
"""
