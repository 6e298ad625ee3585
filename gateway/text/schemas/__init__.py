"""JSON schemas of tools: resolving references, cleaning schemas for grammars, checking values.

May import ``gateway.core`` and ``cluster.core``.
"""
