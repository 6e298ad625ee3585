"""KV blocks of one attention worker: the pool, the tensors, the prefix cache, eviction.

Imports ``workers.model`` and ``workers.requests``.
"""
