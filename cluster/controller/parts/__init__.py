"""What the controller consists of: its table of workers, generations, detection, recovery, epochs.

Imports ``cluster.policy`` and the floors below, and ``prometheus_client``.
"""
