"""The gateway: HTTP and gRPC servers, tokenizer, admission, routing; ``app`` runs it in Ray Serve.

Layers, from the lowest: ``core``; ``text``, ``auth``, ``cluster``; ``engines``,
``observability``; ``generation``; ``http``, ``grpc`` and ``listener``; ``admin``; ``app``.
Only ``app`` and ``cluster.client`` import Ray; no module imports torch.
"""
