"""Placement planners: they take expert load and return a placement. Pure.

Imports ``cluster.core`` and numpy.
"""
