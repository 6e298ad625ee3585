"""The attention workers as the gateway sees them: streams, routing, resubmission.

Imports ``gateway.core``, ``gateway.cluster``, ``workers.requests`` and grpcio.
"""
