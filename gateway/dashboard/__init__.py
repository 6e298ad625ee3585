"""The dashboard, the web page of a cluster: static files, and the data that they show.

The files need no key; the data needs one. On the admin port, the same page has buttons for
operations.
"""
