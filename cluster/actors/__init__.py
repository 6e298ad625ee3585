"""The controller as a Ray actor: the sockets, clock and processes around the state machine.

Imports Ray and all of ``cluster`` except ``launch`` and ``cli``. The worker classes are passed in
as arguments.
"""
