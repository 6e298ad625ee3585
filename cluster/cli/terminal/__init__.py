"""What all commands share: output, exit codes, progress, the HTTP client of a running cluster.

Imports ``cluster.core``, ``cluster.actors`` and ``cluster.launch``; no command.
"""
