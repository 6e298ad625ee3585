"""Spans of requests and of cluster changes, log records, and the files and disks that they fill.

Nobody else imports OpenTelemetry. Imports ``cluster.core``.
"""
