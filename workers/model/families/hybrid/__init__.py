"""Families in which layers with a recurrent state stand among layers with attention.

Imports ``workers.model`` and what all families share.
"""
