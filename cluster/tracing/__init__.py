"""Spans of requests and of cluster changes. The only folder that imports OpenTelemetry.

Imports ``cluster.core``.
"""
