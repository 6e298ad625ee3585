"""Text to tokens and back: tokenizer, chat templates, tools, structured output.

Imports ``gateway.core``, ``workers.requests``, tokenizers and jinja2.
"""
