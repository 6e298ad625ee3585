"""The gRPC interface ``expertmesh.v1.Inference``.

Imports ``gateway.generation`` and the layers below it, ``protos`` and grpcio.
"""
