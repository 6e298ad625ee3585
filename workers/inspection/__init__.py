"""Records internal values of a forward pass for requests with an inspection.

Imports ``workers.model``, ``workers.sampling`` and ``workers.requests``.
"""
