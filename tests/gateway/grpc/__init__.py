"""Tests of ``gateway.grpc``."""
