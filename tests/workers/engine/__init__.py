"""Tests of ``workers.engine``."""
