"""Sampling of tokens from logits: logits processors, grammars, the sampler.

Imports ``workers.requests``, ``workers.native``, torch and llguidance.
"""
