"""Moving experts to where the load is, while the cluster serves.

Imports ``cluster.controller.parts`` and the floors below.
"""
