"""Planning without a cluster: the start plan, the roofline, pool sizes, replays of a load.

Imports ``cluster.core``, ``cluster.config``, ``cluster.planner`` and numpy; pure.
"""
