"""API keys with their limits, and TLS.

Imports ``gateway.core``.
"""
