"""The composition root: one process starts Ray, the controller, the workers and the gateway.

Imports everything; torch only in a child process.
"""
