"""Connections between workers: sockets or torch.distributed, frames, handshakes.

Imports ``cluster.core``, ``cluster.config``, ``workers.requests`` and ``workers.model``.
"""
