"""Model families in folders by kind of attention, and their shared code.

Each family has one module, with its config, tensors, attention, router and expert banks. May import
``workers.model``; no other package names a family.
"""
