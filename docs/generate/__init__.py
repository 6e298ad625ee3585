"""What writes the reference pages from the code: ``python -m docs.generate``.

May import the product's packages and grpcio-tools; no package of the product may import it.
"""
