"""What a worker measures of its steps: histograms, timelines, padding, activity.

Imports ``workers.model``, ``workers.requests`` and ``cluster.core``.
"""
