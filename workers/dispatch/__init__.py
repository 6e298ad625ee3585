"""Dispatch and combine: rows to the experts, weighted sums back, and the expert side of a step.

Imports ``workers.metrics``, ``workers.transport`` and the floors below.
"""
