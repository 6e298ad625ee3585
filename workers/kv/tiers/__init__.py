"""Copies of KV blocks outside the pool: in host memory and on local disk.

Imports ``workers.kv`` and ``workers.requests``. ``workers.kv.transfer`` fills them from the pool,
``workers.process.intake`` restores them.
"""
