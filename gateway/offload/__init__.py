"""Work that would block the event loop: large texts are measured first, then parsed in a thread.

Imports ``gateway.core`` and layers below.
"""
