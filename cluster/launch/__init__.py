"""The composition root: one process starts Ray, controller, workers and gateway.

Imports everything; torch only in a child process.
"""
