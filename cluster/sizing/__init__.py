"""Plans without a cluster: the start plan, roofline estimates, pool sizes, replays of loads.

Imports ``cluster.core``, ``cluster.config``, ``cluster.planner`` and numpy; pure.
"""
