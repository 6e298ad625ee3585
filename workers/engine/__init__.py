"""The engine of one attention worker: schedule, run, sample, commit, emit.

Imports all of ``workers`` except ``process``; never Ray or gRPC.
"""
