"""Helpers of all commands: output, exit codes, progress, the HTTP client of a running cluster.

Imports ``cluster.launch``, layers below it and Ray, but no module of a command.
"""
