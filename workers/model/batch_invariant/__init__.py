"""Products and attention whose results do not depend on the batch, for ``--deterministic``.

Imports ``workers.model``.
"""
