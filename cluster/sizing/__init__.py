"""Predictions without a cluster: roofline, pool sizes, replays of a changing load.

Imports ``cluster.core``, ``cluster.config``, ``cluster.planner`` and numpy; pure.
"""
