"""A request, its outputs and the step header as plain data, and their form on the wire.

Imports ``protos``, ``cluster.core``, ``cluster.config`` and numpy; never torch.
"""
