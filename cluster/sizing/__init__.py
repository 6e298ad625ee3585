"""What is decided without a cluster: the plan of a start, roofline, pool sizes, replays of a load.

Imports ``cluster.core``, ``cluster.config``, ``cluster.planner`` and numpy; pure.
"""
