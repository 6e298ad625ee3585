"""The engine and the Ray actors that run it, all in folders.

Floors, from the ground up: ``requests``, ``native``, ``cuda``; ``model``, ``transport``,
``metrics``; ``kv``, ``sampling``, ``experts``, ``dispatch``, ``inspection``; ``engine``;
``process``. Ray and gRPC are imported in ``process`` only.
"""
