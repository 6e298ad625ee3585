"""The gateway: HTTP and gRPC, tokenizer, admission, routing. ``app`` is the Ray Serve deployment.

Floors, from the ground up: ``core``; ``text``, ``auth``, ``cluster``; ``engines``,
``observability``; ``generation``; ``http``, ``grpc`` and ``listener``; ``admin``; ``app``.
Ray is imported in ``app`` and ``cluster.client`` only; torch never.
"""
