"""Anthropic's Messages as a codec: bodies to calls, generations to messages and events.

May import ``gateway.core``, ``gateway.text``, ``gateway.generation``, ``cluster.core.errors``,
``workers.requests`` and pydantic. ``gateway/http/messages.py`` serves it.
"""
