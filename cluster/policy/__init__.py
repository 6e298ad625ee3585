"""Policies of the controller: they take plain values and return a decision.

Imports ``cluster.core``, ``config``, ``planner``, ``load`` and ``sizing``; no Ray, socket or clock.
"""
