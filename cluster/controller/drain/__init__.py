"""Emptying workers and nodes before they leave.

Imports ``cluster.controller.parts``, ``cluster.controller.rebalance`` and the floors below.
"""
