"""Which rows the next step of one attention worker runs: admission, preemption, drafts, the plan.

Pure: no clock or socket. Imports ``workers.requests`` and the pure modules of ``workers.kv`` and
``workers.speculation``; never torch.
"""
