"""Programs that use other projects' clients, unchanged, against a running server.

Each is run as ``PROGRAM URL MODEL`` by ``tests/conformance/test_clients.py``, in an environment
that has the client, and must end well. None imports anything of ours.
"""
