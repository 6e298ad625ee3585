"""The forms that answers take: grammars that clients ask for, and calls of tools.

May import ``gateway.core``, ``cluster.core.errors`` and ``workers.requests``.
"""
