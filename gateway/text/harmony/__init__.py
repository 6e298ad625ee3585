"""OpenAI's Harmony format, in which gpt-oss reads and writes: prompts, grammars, answers.

May import ``gateway.core``, ``gateway.text.forms``, ``cluster.core.errors`` and
``workers.requests``.
"""
