"""Requests before the engine runs them: they wait for a grammar, or for KV blocks of a peer or a
lower tier.

Imports ``workers.engine`` and the floors below; never Ray or gRPC.
"""
