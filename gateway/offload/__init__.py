"""Work that would stop the event loop: large texts are counted first, then read in a thread.

Imports ``gateway.core`` and the floors below.
"""
