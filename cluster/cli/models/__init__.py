"""Commands that call the served model: generate, chat, tokenize, inspect.

Imports ``cluster.cli.terminal``.
"""
