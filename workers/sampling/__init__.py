"""From logits to tokens: logits processors, grammars, the sampler.

Imports ``workers.requests``, torch and llguidance.
"""
