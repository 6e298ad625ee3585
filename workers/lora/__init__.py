"""LoRA adapters: PEFT folders, their matrices, and the deltas that they add to rows.

May import ``workers.model`` and the packages below it; never Ray or gRPC.
"""
