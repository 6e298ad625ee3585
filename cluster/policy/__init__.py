"""Policies of the controller: functions of plain values that return a decision.

Imports ``cluster.core``, ``config``, ``planner``, ``load`` and ``sizing``; no Ray, socket or clock.
"""
