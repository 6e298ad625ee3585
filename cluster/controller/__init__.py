"""The controller's state machine, which turns events into effects.

Imports ``cluster.policy``, lower layers and ``prometheus_client``, but no Ray, sockets or clock.
"""
