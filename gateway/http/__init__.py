"""The HTTP interface: routes, bodies, server-sent events.

Imports ``gateway.calls`` and the layers below; FastAPI and pydantic.
"""
