"""The configuration as frozen dataclasses, one for each component.

Imports ``cluster.core``.
"""
