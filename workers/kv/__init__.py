"""KV blocks of one attention worker: block pool, cache tensors, prefix cache and eviction.

Imports ``workers.model`` and ``workers.requests``.
"""
