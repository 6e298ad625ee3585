"""OpenAI's Harmony format, in which gpt-oss reads and writes: prompts, grammars, answers.

May import ``gateway.core`` and ``gateway.text.forms``.
"""
