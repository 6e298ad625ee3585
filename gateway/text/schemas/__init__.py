"""JSON schemas of tools: references, clean schemas, their alternatives, texts and values.

It may use ``gateway.core`` and the core of the cluster.
"""
