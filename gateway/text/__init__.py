"""Conversion between text and tokens: tokenizer, chat templates, tools, structured output.

``tool_formats`` has the tool call formats, ``harmony`` the format of gpt-oss. Imports
``gateway.core``, ``gateway.offload``, ``cluster.core.errors``, ``cluster.disk.threads``,
``workers.requests``, tokenizers and jinja2.
"""
