"""Records values inside a forward pass for requests that ask for them.

Imports ``workers.model``, ``workers.sampling`` and ``workers.requests``.
"""
