"""What all of the gateway shares: a call, its answer's pieces, checks of fields, the error table.

Imports ``workers.requests``, ``cluster.core`` and ``cluster.config``.
"""
