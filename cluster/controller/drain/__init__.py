"""Draining workers while the cluster serves.

Imports ``cluster.controller.rebalance``, lower modules of the controller and lower layers.
"""
