"""Spans of requests and of cluster changes, and log records. Only this folder imports OpenTelemetry.

Imports ``cluster.core``.
"""
