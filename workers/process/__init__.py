"""Worker processes: Ray actors, control socket, engine stream, data thread.

Imports all of ``workers``, Ray and gRPC.
"""
