"""The worker as a process: its Ray actor, its data thread, its control side and the commands.

Puts the roles (``workers.process.roles``) and the membership (``workers.process.control``)
together. Imports all of ``workers``; ``actor`` alone imports Ray.
"""
