"""Commands that call the served models, or replace them: generate, chat, inspect, models.

Imports ``cluster.cli.terminal``.
"""
