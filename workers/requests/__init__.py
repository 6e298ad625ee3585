"""A request, its outputs and the step header as plain data, and their form on the wire.

Imports ``cluster.core`` and numpy; never torch.
"""
