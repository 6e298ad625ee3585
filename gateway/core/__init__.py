"""Types that all protocols of the gateway share: calls, output, field checks, error table.

Imports ``workers.requests``, ``cluster.core`` and ``cluster.config``; ``bodies`` imports pydantic.
"""
