"""Commands that start, stop, watch and change a cluster.

Imports ``terminal``, ``options`` and ``experts`` beside it, ``cluster.launch`` and floors below.
"""
