"""Model families in folders by kind of attention, beside what all of them share.

One module for each family: config, tensors, attention, router, expert banks. Imports
``workers.model``; nothing else names a family.
"""
