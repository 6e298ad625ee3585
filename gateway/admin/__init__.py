"""The admin service, over HTTP and gRPC, each on a port of its own.

Imports ``gateway.http``, ``gateway.grpc`` and layers below.
"""
