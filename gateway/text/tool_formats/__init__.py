"""Tool call formats and structured output: parsers and grammars of answers.

May import ``gateway.core``, ``cluster.core.errors`` and ``workers.requests``.
"""
