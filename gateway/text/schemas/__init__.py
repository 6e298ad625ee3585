"""JSON schemas of tools: references, clean schemas, their alternatives, texts and values.

May import ``gateway.core`` and ``cluster.core``.
"""
