"""The roles of a worker: attention serves requests, experts compute rows. A worker has one or both.

Imports all of ``workers`` except ``workers.process.worker.worker``.
"""
