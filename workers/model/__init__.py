"""Building blocks of the models: layers, rotary embedding, attention, compute threads.

May import torch, ``cluster.core`` and ``cluster.config``.
"""
