"""OpenAI's Harmony format of gpt-oss: prompts, grammars and parsers of answers.

May import ``gateway.core``, ``gateway.text.tool_formats``, ``cluster.core.errors`` and
``workers.requests``.
"""
