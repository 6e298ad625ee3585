"""The web page of a cluster: static files, and the data that they show.

The files are served without a key; what they show needs one, as any other answer does. On the admin
port the same page has buttons that give orders.
"""
