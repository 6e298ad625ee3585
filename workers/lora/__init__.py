"""Low-rank adapters: folders as PEFT writes them, their matrices, and what they add to rows.

May import ``workers.model`` and the floors below it; never Ray or gRPC.
"""
