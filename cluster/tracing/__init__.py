"""Spans of requests and of cluster changes, and log records. Nobody else imports OpenTelemetry.

Imports ``cluster.core``.
"""
