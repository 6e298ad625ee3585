"""The engine, and the Ray actors around it.

Only ``actor``, ``attention_worker`` and ``expert_worker`` import Ray; the rest is torch over the
leaves of ``cluster``.
"""
