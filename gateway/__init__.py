"""The gateway: HTTP and gRPC servers, tokenizer, admission and routing. ``app`` is its Serve app.

Layers, from the lowest: ``core``; ``text``, ``auth``, ``cluster``; ``engines``,
``observability``; ``generation``; ``http``, ``grpc`` and ``listener``; ``admin``; ``app``.
Only ``app`` and ``cluster.client`` import Ray; no module imports torch.
"""
