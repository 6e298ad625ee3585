"""KV blocks that one attention worker takes from another.

Imports ``workers.kv`` and ``workers.transport``.
"""
