"""Requests, their outputs and the step header as plain data, on the wire too; whose turn it is.

Imports ``cluster.core`` and numpy; never torch.
"""
