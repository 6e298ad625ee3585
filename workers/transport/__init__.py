"""Connections between workers over sockets or torch.distributed, with frames and handshakes.

Imports ``cluster.core``, ``cluster.config``, ``workers.requests`` and ``workers.model``.
"""
