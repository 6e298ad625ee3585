"""Measures a worker's steps: histograms, timelines, padding, activity.

Imports ``workers.model``, ``workers.requests`` and ``cluster.core``.
"""
