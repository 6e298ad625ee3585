"""Pure placement planners: expert load in, placement out.

Imports the cluster leaves and numpy only.
"""
