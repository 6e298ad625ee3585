"""Expert load over time: counted tokens, windows, averages and the resulting balance.

Imports ``cluster.core``, ``cluster.config`` and numpy; pure.
"""
