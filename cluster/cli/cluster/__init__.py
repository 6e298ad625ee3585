"""Commands that start, stop, watch and change a cluster.

Imports ``terminal``, ``options`` and ``experts`` of this package, ``cluster.launch`` and layers
below.
"""
