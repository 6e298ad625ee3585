"""The controller's state machine: events in, frames and orders out.

Imports its own parts and the floors below; no Ray, socket or clock.
"""
