"""Beam search: which outputs it keeps, what may follow them, and which sequences its beams are.

Imports ``workers.requests``, ``workers.model`` and torch.
"""
