"""API keys with their limits and adapters, and TLS.

Imports ``cluster.core`` and ``cluster.config``.
"""
