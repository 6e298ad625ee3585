"""The data plane between attention and expert workers.

Imports the cluster leaves and torch; never Ray.
"""
