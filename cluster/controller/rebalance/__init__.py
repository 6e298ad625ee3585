"""Moves experts while the cluster serves, so that the load is balanced.

Imports lower modules of the controller and the floors below.
"""
