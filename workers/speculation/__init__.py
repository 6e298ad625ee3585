"""Speculative decoding: guesses at the next tokens, and whether rows for them pay.

Imports ``workers.requests`` and ``cluster.config``; never torch.
"""
