"""The commands below ``bench``: how fast a server is, and two saved measurements compared.

Imports ``cluster.cli.terminal``, ``protos``, aiohttp and grpcio.
"""
