"""What the controller consists of: its table of workers, generations, detection, recovery, epochs.

Imports ``cluster.core``, ``config``, ``planner`` and ``policy``.
"""
