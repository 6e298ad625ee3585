"""Commands about experts: show their load and placement, and rebalance them.

Imports ``cluster.cli.terminal`` and ``cluster.core``.
"""
