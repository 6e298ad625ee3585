"""API keys with their limits, and TLS.

Imports ``cluster.core`` and ``cluster.config``.
"""
