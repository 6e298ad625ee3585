"""Objects of clients that gateways keep between requests, in a folder that they share.

Imports ``gateway.core`` and layers below.
"""
