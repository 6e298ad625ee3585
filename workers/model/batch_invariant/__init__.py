"""Products and attention whose rows do not depend on the batch, for ``--deterministic``.

Imports ``workers.model``.
"""
