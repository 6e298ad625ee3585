"""The inference engine, and the Ray actors (workers) that run it.

Layers, from the lowest to the highest: ``requests``, ``native``, ``cuda``; ``model``,
``transport``, ``metrics``; ``kv``, ``sampling``, ``experts``, ``dispatch``, ``inspection``;
``engine``; ``process``. Only ``process`` imports Ray and gRPC.
"""
