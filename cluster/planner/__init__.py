"""Placement planners, which compute a placement from expert load. Pure.

Imports ``cluster.core`` and numpy.
"""
