"""What the whole gateway shares: a call, pieces of its answer, checks of fields, the error table.

Imports ``workers.requests``, ``cluster.core`` and ``cluster.config``; ``bodies`` pydantic.
"""
