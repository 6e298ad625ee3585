"""Options of ``serve`` and ``up``: flags, environment variables and files become a configuration.

Imports ``cluster.cli.terminal``, ``cluster.launch`` and the floors below, and of ``gateway`` what
checks options: key files, TLS files, tools.
"""
