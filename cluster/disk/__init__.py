"""Atomic writes of files, and threads for calls that may wait for a disk.

Imports the standard library alone.
"""
