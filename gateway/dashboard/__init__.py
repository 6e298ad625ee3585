"""The web page of a cluster: static files, and their data.

The files are served without a key; their data needs one, as any other response does. On the admin
port the same page has buttons for operations.
"""
