"""The controller as a Ray actor: connects its state machine with sockets, clock and processes.

Imports Ray and all of ``cluster`` except ``launch`` and ``cli``. Callers pass the worker classes as
arguments.
"""
