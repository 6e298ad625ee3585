"""Recording the inside of a forward pass for requests that ask for it.

Imports ``workers.model``, ``workers.sampling`` and ``workers.requests``.
"""
