"""Prometheus metrics.

Imports ``gateway.core`` and ``gateway.cluster``.
"""
