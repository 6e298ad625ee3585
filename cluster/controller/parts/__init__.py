"""The parts of the controller, and the model that they share.

Imports ``cluster.policy`` and the floors below, and ``prometheus_client``.
"""
