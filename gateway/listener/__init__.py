"""HTTP ports of a gateway: sockets, and limits of size and time for each connection.

Each module states what it adds to uvicorn, with the upstream issue if there is one.
Imports ``cluster.core``, ``gateway.core``, ``gateway.auth``, uvicorn and httptools.
"""
