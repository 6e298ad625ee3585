"""The engine of one attention worker: schedules, runs, samples and commits steps, queues outputs.

May import all of ``workers`` except ``process``; must not import Ray or gRPC.
"""
