"""The worker as a process: Ray actor, data thread, control side and controller commands.

Combines the roles (``workers.process.roles``) and the membership (``workers.process.control``).
Imports all of ``workers``; only ``actor`` imports Ray.
"""
