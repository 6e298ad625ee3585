"""HTTP ports of a gateway: their sockets, and limits of size and time for every connection.

Each module says which gap of uvicorn it closes, with the upstream issue where one is known.
Imports ``cluster.core``, ``gateway.core``, ``gateway.auth`` and uvicorn.
"""
