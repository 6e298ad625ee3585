"""Commands that need no cluster: plan, config, doctor, version.

Imports ``cluster.cli.terminal``, ``cluster.cli.options``, ``cluster.launch`` and layers below.
"""
