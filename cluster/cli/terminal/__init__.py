"""What all commands share: output, exit codes, progress, the HTTP client of a running cluster.

Imports ``cluster.launch`` and the floors below, and Ray; no command.
"""
