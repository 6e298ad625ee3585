"""The commands below ``bench``: measure a server, and compare two saved measurements.

Imports ``cluster.cli.terminal``, ``protos``, aiohttp and grpcio.
"""
