"""How a restarted controller takes over running workers: it collects reports, restores state.

Imports ``cluster.controller.parts``, ``cluster.controller.drain`` and the floors below.
"""
