"""From a validated call to a running generation, and its trace.

Imports ``gateway.engines``, ``observability`` and the floors below, and ``cluster.tracing``.
"""
