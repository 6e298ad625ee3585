"""Commands that talk to the served model: generate, chat, tokenize, inspect.

Imports ``cluster.cli.terminal``.
"""
