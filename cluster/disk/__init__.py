"""Files and disks: contents that stay whole, and threads for calls that wait for a disk.

Imports the standard library alone.
"""
