"""OpenAI's Responses protocol: items in, items and events out, and responses that are stored.

Imports ``gateway.http``, ``gateway.state`` and the floors below.
"""
