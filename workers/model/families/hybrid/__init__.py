"""Families that mix layers with a recurrent state and layers with attention.

Imports ``workers.model`` and the shared code of all families.
"""
