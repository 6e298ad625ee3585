"""Transfer of KV blocks between the pool, other workers and lower tiers.

Imports ``workers.kv``, its ``tiers`` and ``workers.requests``. ``workers.process.intake`` opens the
connections.
"""
