"""The cluster as the gateway sees it: the controller's snapshot and the other serve replicas.

Imports ``gateway.core``; Ray in ``client`` only.
"""
