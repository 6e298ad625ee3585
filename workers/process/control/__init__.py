"""A worker's side of the control plane: control socket, lease, membership, epochs, reports.

Imports ``workers.engine`` and the layers below it; never Ray or gRPC.
"""
