"""KV blocks that one attention worker takes from another.

Imports ``workers.kv`` and ``workers.requests``. ``workers.process.intake`` makes the connections.
"""
