"""The controller as a Ray actor: the sockets, clock and processes around the state machine.

Imports Ray and everything of ``cluster`` but ``launch`` and ``cli``. It gets the classes of the
workers as arguments.
"""
