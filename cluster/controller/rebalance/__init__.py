"""Moves experts while the cluster serves, to balance the load.

Imports lower modules of the controller and lower layers.
"""
