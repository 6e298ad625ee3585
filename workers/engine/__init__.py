"""The engine of one attention worker: schedule, run, sample, commit, emit.

Imports all of ``workers`` but ``process``; never Ray or gRPC.
"""
