"""The gRPC interface ``expertmesh.v1.Inference``.

Imports ``gateway.calls`` and the layers below it, ``protos`` and grpcio.
"""
