"""Commands about experts: their load, their placement, rebalancing.

Imports ``cluster.cli.terminal`` and ``cluster.core``.
"""
