"""Beam search: candidate tokens, search steps, and the sequences of beams.

Imports ``workers.requests``, ``workers.model`` and torch.
"""
