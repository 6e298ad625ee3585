"""Requests before the engine runs them: waiting for a grammar, or for KV blocks of a peer or tier.

Imports ``workers.engine`` and the floors below; never Ray or gRPC.
"""
