"""OpenAI's Responses API: converts items to calls, and calls to items and events; stores responses.

Imports ``gateway.http``, ``gateway.state`` and the layers below.
"""
