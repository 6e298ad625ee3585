"""Loading experts while serving, from the checkpoint or from another worker's memory.

Imports ``workers.experts`` and ``workers.transport``.
"""
