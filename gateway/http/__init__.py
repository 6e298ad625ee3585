"""The HTTP interface: routes, bodies, server-sent events.

Imports ``gateway.generation`` and the floors below; FastAPI and pydantic.
"""
