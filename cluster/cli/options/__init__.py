"""Options of ``serve`` and ``up``: flags, environment variables and files become a configuration.

Imports ``cluster.cli.terminal``, ``cluster.launch`` and layers below, and from ``gateway`` the
checks of key files, TLS files and tools.
"""
