"""Prometheus metrics.

Imports ``gateway.core``, ``gateway.cluster`` and ``prometheus_client``.
"""
