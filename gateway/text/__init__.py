"""Text to tokens and back: tokenizer, chat templates, tools, structured output.

``forms`` has the forms of answers, ``harmony`` the format of gpt-oss. Imports ``gateway.core``,
``gateway.offload``, ``cluster.core.errors``, ``workers.requests``, tokenizers and jinja2.
"""
