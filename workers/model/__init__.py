"""Building blocks of the models: layers, rotary embedding, attention, compute threads.

Imports torch, ``cluster.core`` and ``cluster.config``.
"""
