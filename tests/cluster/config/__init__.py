"""Tests of ``cluster.config``."""
