"""Commands that need no running cluster: plan, config, doctor, version, completion.

Imports ``cluster.cli.terminal``, ``cluster.cli.options``, ``cluster.launch`` and layers below.
"""
