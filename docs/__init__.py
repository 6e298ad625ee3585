"""The documents, what generates parts of them (``generate``), and the site's configuration.

No package of the product may import it.
"""
