"""Draining workers while the cluster serves.

Imports ``cluster.controller.rebalance``, ``parts`` and the floors below.
"""
