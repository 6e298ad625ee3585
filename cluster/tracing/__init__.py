"""Spans of requests and of cluster changes, log records, the files and disks that they fill, and
what gateways have counted.

Nobody else imports OpenTelemetry. Imports ``cluster.core``.
"""
