"""Helpers of all commands: output, exit codes, progress, the HTTP client of a running cluster.

Imports ``cluster.launch`` and layers below, and Ray; no command.
"""
