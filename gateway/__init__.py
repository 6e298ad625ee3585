"""The front door: HTTP and gRPC, tokenizer, admission, routing.

Imports protos, ``workers.request``, ``workers.wire`` and the cluster leaves; Ray only in ``app``
and ``cluster_client``; never torch.
"""
