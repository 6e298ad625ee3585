"""The .proto contracts of package expertmesh.v1 and their generated stubs.

Imports nothing of ours.
"""
