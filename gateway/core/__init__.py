"""Shared types of the gateway: calls, pieces of output, field checks, the error table.

Imports ``workers.requests``, ``cluster.core`` and ``cluster.config``; ``bodies`` imports pydantic.
"""
