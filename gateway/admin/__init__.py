"""The admin service, over HTTP and gRPC, on one port each.

Imports ``gateway.http``, ``grpc`` and ``listener``, and the layers below them.
"""
