"""Controller failover: a restarted controller collects reports and restores its state from them.

Imports ``cluster.controller.parts``, ``cluster.controller.drain`` and the floors below.
"""
