"""The command line ``expertmesh``: ``main``, and a folder for each group of commands.

Imports everything; torch only behind a function.
"""
