"""Pure placement planners: expert load in, placement out.

Imports ``cluster.core`` and numpy.
"""
