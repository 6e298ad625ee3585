"""Types that every package shares: errors, members, placements, states, control frames.

Imports the standard library, numpy, msgspec and, in one module each, ``prometheus_client``
(``metric_families``) and ``psutil`` (``process``).
"""
