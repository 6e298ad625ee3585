"""Tests of ``workers.dispatch``."""
