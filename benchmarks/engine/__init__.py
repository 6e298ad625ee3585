"""The engine and its parts in one process, without a server."""
