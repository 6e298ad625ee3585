"""Anthropic's Messages API: converts bodies to calls, and running calls to messages and events.

May import ``gateway.core``, ``gateway.text``, ``gateway.calls``, ``cluster.core.errors``,
``workers.requests`` and pydantic. ``gateway/http/messages.py`` serves it.
"""
