"""Speculative decoding: guesses the next tokens, and decides whether to run rows for them.

Imports ``workers.requests`` and ``cluster.config``; never torch.
"""
