"""Trace spans of requests and cluster changes, logs and their rotation, checks of disks, and counts
of gateways.

No other folder imports OpenTelemetry. Imports ``cluster.core``.
"""
