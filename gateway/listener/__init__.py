"""HTTP ports of a gateway: their sockets, and limits of size and time for every connection.

Each module names the gap in uvicorn that it closes, with the upstream issue if there is one.
Imports ``cluster.core``, ``gateway.core``, ``gateway.auth`` and uvicorn.
"""
