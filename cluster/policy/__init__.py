"""Policies of the controller: plain values in, a decision out.

Imports ``cluster.core``, ``config``, ``planner``, ``load`` and ``sizing``; no Ray, socket or clock.
"""
