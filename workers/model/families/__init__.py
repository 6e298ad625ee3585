"""One module for each model family: config, tensors, attention, router, expert banks.

Imports ``workers.model``; nothing else names a family.
"""
