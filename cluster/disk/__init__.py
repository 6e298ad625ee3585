"""Files that are written atomically, and threads for calls that wait for a disk.

Imports the standard library alone.
"""
