"""Tests of ``cluster.core``."""
