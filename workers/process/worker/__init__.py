"""The worker as a process: its Ray actor, its data thread, its control side and the commands.

Combines the roles (``workers.process.roles``) and the membership (``workers.process.control``).
Imports all of ``workers``; only ``actor`` imports Ray.
"""
