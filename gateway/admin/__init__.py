"""The admin service, over HTTP and gRPC, on one port each.

Imports ``gateway.http``, ``gateway.grpc`` and layers below.
"""
