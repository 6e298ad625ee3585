"""A worker's side of the controller: control socket, lease, membership, epochs, reports.

Imports ``workers.engine`` and the floors below; never Ray or gRPC.
"""
