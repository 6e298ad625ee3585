"""Loads experts while the worker serves, from the checkpoint or another worker's memory.

Imports ``workers.experts`` and ``workers.transport``.
"""
