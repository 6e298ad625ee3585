"""Requests, their outputs and the step header as plain data, on the wire too.

Imports ``cluster.core`` and numpy; never torch.
"""
