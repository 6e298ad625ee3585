"""The gateway: HTTP and gRPC servers, tokenizer, admission and routing. ``app`` runs it in Serve.

Layers, from the lowest: ``core``; ``offload``; ``text``, ``auth``, ``cluster``, ``state``;
``engines``, ``observability``; ``calls``; ``dashboard``; ``anthropic``; ``grpc``, ``http``,
``listener``; ``batches``, ``responses``; ``admin``, ``protocols``; ``app``. No module imports
torch; only ``app`` and ``cluster.client`` import Ray.
"""
