"""The gRPC interface ``expertmesh.v1.Inference``.

Imports ``gateway.generation`` and the floors below, ``protos`` and grpcio.
"""
