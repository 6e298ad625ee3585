"""Requests that the engine does not run yet: they wait for a grammar or for KV blocks.

KV blocks come from a peer or a lower tier. "The engine's thread" is the worker's data thread.
Imports ``workers.engine`` and the layers below it; never Ray or gRPC.
"""
