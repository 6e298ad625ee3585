"""KV blocks that leave the pool and come in: to and from other workers, and lower tiers.

Imports ``workers.kv``, its ``tiers`` and ``workers.requests``. ``workers.process.intake`` makes the
connections.
"""
