"""The roles of a worker: attention (serves requests), experts (computes rows), or both.

Imports all of ``workers`` except ``workers.process.worker.worker``.
"""
