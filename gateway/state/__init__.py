"""What gateways keep for their clients between requests, in a folder that they share.

Imports ``gateway.core`` and the floors below.
"""
