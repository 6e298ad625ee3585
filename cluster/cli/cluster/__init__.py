"""Commands that start, stop, monitor and change a cluster.

Imports ``terminal``, ``options`` and ``experts`` of this package, ``cluster.launch`` and layers
below.
"""
