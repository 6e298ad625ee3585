"""Products and attention in which a row's bits do not depend on its batch, for ``--deterministic``.

Imports ``workers.model``.
"""
