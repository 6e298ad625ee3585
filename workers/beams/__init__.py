"""Beam search: retained outputs, candidate tokens, and the sequences of beams.

Imports ``workers.requests``, ``workers.model`` and torch.
"""
