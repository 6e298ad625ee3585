"""Schedules the rows of an attention worker's next step: admission, preemption, drafts, plan.

Pure: no clock or socket. Imports ``workers.requests`` and the pure modules of ``workers.kv`` and
``workers.speculation``; never torch.
"""
