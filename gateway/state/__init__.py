"""Stores objects of clients between requests, in a folder that gateways share.

Imports ``gateway.core`` and layers below.
"""
