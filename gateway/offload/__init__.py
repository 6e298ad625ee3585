"""Runs work that would block the event loop, such as parsing large texts, in threads.

Imports ``gateway.core`` and layers below.
"""
