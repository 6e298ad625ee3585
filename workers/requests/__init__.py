"""Requests, outputs of requests and the step header as plain data, also in messages.

Imports ``cluster.core`` and numpy; never torch.
"""
