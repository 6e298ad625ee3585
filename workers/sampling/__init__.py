"""From logits to tokens: logits processors, grammars, the sampler.

Imports torch and ``workers.requests``.
"""
