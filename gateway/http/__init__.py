"""The HTTP interface: routes, bodies, server-sent events.

Imports ``gateway.calls`` and the floors below; FastAPI and pydantic.
"""
