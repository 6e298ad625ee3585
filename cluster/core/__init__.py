"""Values that every package shares: errors, ranks, placements, states, control frames.

Imports the standard library, numpy, msgspec and, in ``metric_families``, ``prometheus_client``.
"""
