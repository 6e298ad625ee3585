"""Moves experts while the cluster serves, so that the load is balanced.

Imports ``cluster.controller.parts`` and the floors below.
"""
