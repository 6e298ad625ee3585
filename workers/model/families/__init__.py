"""Model families in folders by kind of attention, and their shared code.

One module for each family: config, tensors, attention, router, expert banks. Imports
``workers.model``; no other package names a family.
"""
