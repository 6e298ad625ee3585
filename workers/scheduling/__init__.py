"""Schedules the rows of an attention worker's next step: admits, preempts, drafts and plans.

Pure: no clock or socket. Imports ``workers.requests`` and the pure modules of ``workers.kv`` and
``workers.speculation``; never torch.
"""
