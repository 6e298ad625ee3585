"""Requests, their outputs and the step header as plain data, also on the wire.

Imports ``cluster.core`` and numpy; never torch.
"""
