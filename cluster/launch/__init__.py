"""The launcher process, which starts Ray, the controller, the workers and the gateway.

May import everything, but torch only in a child process.
"""
