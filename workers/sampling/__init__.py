"""From logits to tokens: logits processors, grammars, the sampler.

Imports ``workers.requests``, ``workers.native``, torch and llguidance.
"""
