"""Spans of requests and cluster changes, log records, rotation of files, checks of disks, and the
counts of gateways.

No other folder imports OpenTelemetry. Imports ``cluster.core``.
"""
