"""Building blocks of the MoE models: layers, rotary embedding, attention, compute threads.

May import torch, ``cluster.core`` and ``cluster.config``.
"""
