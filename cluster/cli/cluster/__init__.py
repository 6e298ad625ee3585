"""Commands that start, stop, watch and change a cluster.

Imports ``cluster.cli.terminal``, ``cluster.cli.options`` and ``cluster.launch``.
"""
