"""Weights in codes of 8 or 4 bits: their form, how they are made, and what they stand for.

Imports torch and ``cluster.core``; ``formats`` imports no torch.
"""
