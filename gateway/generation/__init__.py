"""From a validated call to a running generation, and its trace.

Imports ``gateway.core``, ``text``, ``auth``, ``cluster``, ``engines`` and ``observability``.
"""
