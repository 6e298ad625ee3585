"""Families with attention experts, which a router selects for each token.

May import the same packages as ``families``.
"""
