"""Dispatch and combine: rows to the experts, weighted sums back, and the expert side of a step.

Imports ``workers.transport``, ``workers.model``, ``workers.metrics`` and ``workers.requests``.
"""
