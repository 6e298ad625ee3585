"""The controller's state machine: events in, effects out.

Imports ``cluster.policy`` and the floors below, and ``prometheus_client``; no Ray, socket or clock.
"""
