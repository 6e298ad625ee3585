"""Tests of ``workers.model.loading``."""
