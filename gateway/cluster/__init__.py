"""The gateway's view of the cluster: the controller's snapshot and the other gateway replicas.

Imports ``cluster.core`` and ``cluster.tracing``; Ray in ``client`` only.
"""
