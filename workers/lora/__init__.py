"""LoRA adapters: reads PEFT folders, and adds the deltas of their matrices to rows.

May import ``workers.model`` and the layers below it; never Ray or gRPC.
"""
