"""API keys with their limits and adapters, and TLS.

Imports ``cluster.core``, ``cluster.config`` and ``cluster.disk``.
"""
