"""The engine of one attention worker: schedule, run, sample, commit, emit.

May import all of ``workers`` except ``process``; must not import Ray or gRPC.
"""
