"""Expert load over time: counted tokens, windows, averages and the balance they give.

Imports ``cluster.core``, ``cluster.config`` and numpy; pure.
"""
