"""Beam search: candidate tokens, steps of the search, and the sequences of beams.

Imports ``workers.requests``, ``workers.model`` and torch.
"""
