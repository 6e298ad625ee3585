"""Client of the attention workers: streams, routing and resubmission of requests.

Imports ``gateway.core``, ``gateway.cluster``, ``workers.requests`` and grpcio.
"""
