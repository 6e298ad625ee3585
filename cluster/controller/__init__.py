"""The controller's state machine: events in, effects out.

Imports its own parts and the floors below; no Ray, socket or clock.
"""
